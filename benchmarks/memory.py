"""Peak of activations of one rank, all parts of this package against DeepSpeed ALST's own, in the same laboratory.

    python benchmarks/memory.py [--shape 8b | 32b] [--seq_len 1048576] [--sp_size 8] [--top 0]

Tensors have no memory, so any machine will do. u is one hidden state of one rank in bfloat16. ALST's row has
DeepSpeed's TiledMLP with its rule for tiles, a checkpoint of each block that is offloaded, and torch's tiled loss,
since DeepSpeed's asks for values of tensors. Norms are those of transformers; with Liger's, ALST takes less.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ulysses.config import MemoryConfig
from lightning_ulysses.planning.lab import Lab, Rehearsal, Scene, call_with_labels

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "vocab_size": 128256},
    "32b": {"hidden_size": 5120, "intermediate_size": 25600, "num_attention_heads": 64, "vocab_size": 151936},
}
LAYERS = {"8b": 32, "32b": 64}
OFFLOADED = MemoryConfig(checkpoint="block", offload="cpu")
OURS = MemoryConfig(
    tiled_loss=True, tiled_mlp=True, tiled_norm=True, checkpoint="block", offload="cpu", head_chunks="auto"
)


def make(shape: str, layers: int = 4) -> Callable[[], nn.Module]:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    sizes = {**SHAPES[shape], "num_hidden_layers": layers, "num_key_value_heads": 8, "head_dim": 128}
    sizes |= {"use_cache": False, "attn_implementation": "sdpa", "max_position_embeddings": 2**22}
    if shape == "8b":
        return lambda: LlamaForCausalLM(LlamaConfig(**sizes))
    return lambda: Qwen3ForCausalLM(Qwen3Config(**sizes))


def make_alst(shape: str) -> Callable[[], nn.Module]:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    def made() -> nn.Module:
        model = make(shape)()
        for layer in model.model.layers:
            plain = layer.mlp.forward

            def forward(x: Tensor, mlp: nn.Module = layer.mlp, plain: Callable[..., Tensor] = plain) -> Tensor:
                shards = math.ceil(x.shape[1] / x.shape[2])
                return TiledMLP.apply(lambda _, tile: plain(tile), mlp, x, shards, list(mlp.parameters()))

            layer.mlp.forward = forward
        return model

    return made


def tiled_by_torch(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    hidden = model.model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    options = torch.nn.LinearCrossEntropyOptions()
    target = batch["shift_labels"].flatten()
    return torch.nn.functional.linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, target, options=options)


def show(name: str, found: Rehearsal, blocks: int, u: float, top: int) -> float:
    peak = found.on_device(blocks)
    print(f"{name:<28} {peak / u:6.2f} u  {peak / 2**30:7.2f} GiB  host {found.on_host(blocks) / 2**30:6.1f} GiB")
    for held in found.held[:top]:
        print(f"    {held.bytes / u:5.2f} u  {held.made.label:<10} {held.made.operator} {held.made.shape}")
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--seq_len", type=int, default=2**20)
    parser.add_argument("--sp_size", type=int, default=8)
    parser.add_argument("--top", type=int, default=0, help="show the largest tensors at the peak")
    args = parser.parse_args()
    u, blocks = args.seq_len / args.sp_size * SHAPES[args.shape]["hidden_size"] * 2, LAYERS[args.shape]

    def run(lab: Lab, memory: MemoryConfig) -> Rehearsal:
        return lab.rehearse(Scene(args.seq_len, args.sp_size, memory))

    theirs = show(
        "DeepSpeed ALST's parts", run(Lab(make_alst(args.shape), tiled_by_torch), OFFLOADED), blocks, u, args.top
    )
    ours = show("all parts", run(Lab(make(args.shape), call_with_labels), OURS), blocks, u, args.top)
    print(f"ratio {ours / theirs:.3f}")


if __name__ == "__main__":
    main()
