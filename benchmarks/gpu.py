"""What one GPU can do: tokens per second, MFU and peak memory over S, and how long a sequence fits.

    python benchmarks/gpu.py                 # one GPU, less than ten minutes
    python benchmarks/gpu.py --cpu           # the same code on tiny shapes, without a GPU: shows only that it runs

Sides: `lightning`, Lightning's DeepSpeedStrategy with checkpointed blocks; `alst`, the same with DeepSpeed's parts of
ALST, which are TiledMLP, TiledFusedLogitsLoss and checkpoints on the host; `ours`. All train the same Llama in
bfloat16 at ZeRO-2, whose optimizer (SGD) is on the host, so that 8B fits. For each shape and side S doubles until
memory or the side's share of `--seconds` is spent. The longest S that fits is computed from the peaks of the two
longest that ran, which grow linearly; `ran` says how far it was tried.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MARK = "result: "
SHAPES: dict[str, dict[str, int]] = {
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128,
    },
}  # fmt: skip
SIDES = ("lightning", "alst", "ours")


def llama(args: argparse.Namespace) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        use_cache=False, attn_implementation="sdpa", max_position_embeddings=2**24, **SHAPES[args.shape]
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cpu" if args.cpu else "cuda"):
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def alst_parts(model: Any) -> Iterator[Any]:
    """DeepSpeed's tiles for a Llama; gives the loss of a batch."""
    import torch
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss, TiledMLP
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.LlamaMLP.forward

    def mlp(self: Any, x: Any) -> Any:
        weights = [self.down_proj.weight, self.gate_proj.weight, self.up_proj.weight]
        return TiledMLP.apply(plain, self, x, math.ceil(x.shape[1] / x.shape[2]), weights)

    def loss(batch: dict[str, Any]) -> Any:
        hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state
        labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        count = (labels != -100).sum()

        def part(head: Any, x: Any, y: Any) -> Any:
            return torch.nn.functional.cross_entropy(head(x).float(), y, reduction="sum") / count

        # A GiB of logits in float32 for each tile, as ALST has it.
        shards = max(math.ceil(4 * labels.numel() * model.config.vocab_size / 2**30), 1)
        weights = [model.lm_head.weight]
        return TiledFusedLogitsLoss.apply(part, model.lm_head, hidden, labels, None, shards, weights, "sum")

    modeling_llama.LlamaMLP.forward = mlp  # type: ignore[method-assign]
    try:
        yield loss
    finally:
        modeling_llama.LlamaMLP.forward = plain  # type: ignore[method-assign]


def strategy(args: argparse.Namespace) -> Any:
    from lightning_ulysses import UlyssesDeepSpeedStrategy

    settings: dict[str, Any] = {"stage": 2, "offload_optimizer": True}
    if args.side == "ours":
        memory = {"tiled_loss": True, "tiled_mlp": True, "tiled_norm": True, "checkpoint": "block", "offload": "cpu"}
        return UlyssesDeepSpeedStrategy(sp_size=1, memory=memory, **settings)
    if args.cpu:
        from overhead import PlainDeepSpeed

        made: Any = PlainDeepSpeed(**settings)
    else:
        from lightning.pytorch.strategies import DeepSpeedStrategy

        made = DeepSpeedStrategy(**settings)
    # DeepSpeed's own optimizer for the host must be compiled first.
    made.config["zero_force_ds_cpu_optimizer"] = False
    return made


class Stopwatch:
    """Times steps, and says when the time is spent."""

    def __init__(self, args: argparse.Namespace, operations: Any) -> None:
        self.args = args
        self.operations = operations
        self.end = time.perf_counter() + args.seconds
        self.predicted = 0.0
        self._tokens = 0
        self._begin: float | None = None

    def begins(self, tokens: int) -> bool:
        """Whether there is time for a step; the second one of a length is timed."""
        import torch

        if not self.args.cpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        is_first, self._tokens = tokens != self._tokens, tokens
        self._begin = None if is_first else time.perf_counter()
        return not is_first or time.perf_counter() + 2 * self.predicted < self.end

    def ends(self) -> None:
        """Prints what the step took."""
        import torch

        from lightning_ulysses.cost.flops import peak_flops

        if self._begin is None:
            return
        if not self.args.cpu:
            torch.cuda.synchronize()
        seconds, tokens = time.perf_counter() - self._begin, float(self._tokens)
        # Attention grows with the square of S, which doubles.
        self.predicted = 4 * seconds
        peak = peak_flops(torch.device("cpu" if self.args.cpu else "cuda"))
        work = self.operations.of(tokens, tokens**2)
        memory = 0 if self.args.cpu else torch.cuda.max_memory_allocated()
        found = {
            "S": self._tokens, "tokens_per_second": tokens / seconds, "mfu": peak and work / seconds / peak,
            "peak": memory,
        }  # fmt: skip
        print(MARK + json.dumps(found), flush=True)


def child(args: argparse.Namespace) -> None:
    """One shape and side; prints a line for each length."""
    import lightning as L
    import torch
    from torch.utils.data import DataLoader, Dataset

    from lightning_ulysses.cost.flops import model_operations

    class Rows(Dataset):  # type: ignore[type-arg]
        """Each length twice, from the shortest to the longest."""

        def __len__(self) -> int:
            return 2 * (int(math.log2(args.to_len // args.from_len)) + 1)

        def __getitem__(self, index: int) -> dict[str, Any]:
            row = torch.randint(0, SHAPES[args.shape]["vocab_size"], (args.from_len * 2 ** (index // 2),))
            return {"input_ids": row, "labels": row}

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama(args)
            if args.side == "lightning":
                self.model.activation_checkpointing_enable()
            if args.side == "alst":
                self.model.activation_checkpointing_enable(offload=not args.cpu)
            self.watch = Stopwatch(args, model_operations(self.model))
            self.loss: Any = lambda batch: self.model(**batch).loss

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return None if self.watch.begins(batch["input_ids"].shape[1]) else -1

        def on_train_batch_end(self, *given: Any) -> None:
            self.watch.ends()

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            return self.loss(batch)

        def optimizer_zero_grad(self, *given: Any) -> None:
            """DeepSpeed does it in its step. Here, it would delete what ALST's loss has made in the forward."""

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-4)

    module = Module()
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = L.Trainer(
        accelerator="cpu" if args.cpu else "cuda", devices=1, strategy=strategy(args), precision="bf16-true",
        max_epochs=1, **quiet,
    )  # fmt: skip
    parts = alst_parts(module.model) if args.side == "alst" else contextlib.nullcontext(module.loss)
    with parts as module.loss, contextlib.suppress(torch.OutOfMemoryError):
        trainer.fit(module, DataLoader(Rows(), batch_size=1))


def longest(found: list[dict[str, Any]], memory: int) -> int | None:
    """The longest S that fits into ``memory`` bytes, by the line through the peaks of the two longest that ran."""
    if len(found) < 2:
        return None
    (a, b) = found[-2:]
    slope = (b["peak"] - a["peak"]) / (b["S"] - a["S"])
    return None if slope <= 0 else int(b["S"] + (memory - b["peak"]) / slope)


def measure(shape: str, side: str, args: argparse.Namespace, seconds: float) -> list[dict[str, Any]]:
    """What each length gave; the process may end for want of memory."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", "--shape", shape, "--side", side]
    command += ["--from-len", str(args.from_len), "--to-len", str(args.to_len), "--seconds", str(seconds)]
    command += ["--cpu"] * args.cpu
    here = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(here), "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    if args.cpu:
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, errors = process.communicate(timeout=3 * seconds + 60)
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
    found = [json.loads(line.removeprefix(MARK)) for line in out.splitlines() if line.startswith(MARK)]
    if not found:
        print(f"{shape}, {side}: no step ran\n{errors[-2000:]}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="rehearse on tiny shapes without a GPU")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--seconds", type=float, default=480, help="for all sides and shapes together")
    parser.add_argument("--from-len", type=int)
    parser.add_argument("--to-len", type=int)
    for name in ("--child", "--shape", "--side"):
        parser.add_argument(name, help=argparse.SUPPRESS, **({"action": "store_true"} if name == "--child" else {}))  # type: ignore[arg-type]
    args = parser.parse_args()
    if args.child:
        child(args)
        return 0
    import torch

    if not args.cpu and not torch.cuda.is_available():
        print("This benchmark needs a GPU, and torch sees none here. --cpu rehearses it on tiny shapes.")
        return 1
    args.shapes = args.shapes or (["tiny"] if args.cpu else ["1b", "8b"])
    args.from_len, args.to_len = (
        args.from_len or (64 if args.cpu else 2**13),
        args.to_len or (128 if args.cpu else 2**23),
    )
    memory = 0 if args.cpu else torch.cuda.get_device_properties(0).total_memory
    print(f"{'CPU, a rehearsal' if args.cpu else torch.cuda.get_device_name(0)}; torch {torch.__version__}\n")
    print("| shape | side | S | tokens/s | MFU | peak, GiB |\n| --- | --- | --- | --- | --- | --- |")
    ends, share = [], args.seconds / len(args.shapes) / len(args.sides)
    for shape in args.shapes:
        for side in args.sides:
            found = measure(shape, side, args, share)
            for row in found:
                mfu = "" if not row["mfu"] else f"{row['mfu']:.3f}"
                print(
                    f"| {shape} | {side} | {row['S']} | {row['tokens_per_second']:.0f} | {mfu} "
                    f"| {row['peak'] / 2**30:.1f} |",
                    flush=True,
                )
            ends.append((shape, side, found[-1]["S"] if found else None, longest(found, memory)))
    print("\n| shape | side | ran | longest that fits |\n| --- | --- | --- | --- |")
    for shape, side, ran, fits in ends:
        print(f"| {shape} | {side} | {ran or '-'} | {fits or '-'} |")
    return 0 if all(ran for _, _, ran, _ in ends) else 1


if __name__ == "__main__":
    raise SystemExit(main())
