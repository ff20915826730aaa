"""The laboratory counts what the allocator of real tensors counts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import transformers
from nightly import sampled
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lightning_ulysses.config import MemoryConfig
from lightning_ulysses.memory import offload
from lightning_ulysses.memory.host import footprint
from lightning_ulysses.planning.lab import Lab, Scene, call_with_labels, measure_step
from lightning_ulysses.planning.meter import Meter, Workspace
from lightning_ulysses.planning.models import BLOCKS
from lightning_ulysses.planning.stand_ins import HostBytes, on_fake_tensors

SIZES: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "use_cache": False,
    "attn_implementation": "sdpa",
}
#: Kinds of transformers models, with what they need besides.
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 32},
    "Mistral": {"sliding_window": None},
    "Phi3": {"pad_token_id": 0},
    "GPTNeoX": {"rotary_pct": 0.5},
    "Olmo2": {},
    "Cohere": {},
    "Granite": {},
    "StableLm": {},
    "GPT2": {"n_embd": 128, "n_layer": 3, "n_head": 8, "n_positions": 8192, "n_inner": 384},
}
TILES = {"tiled_loss": True, "tiled_mlp": True, "tiled_norm": True, "tile_bytes": 2**20}
PARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpoint": {"checkpoint": "block"},
    "tiled": {"checkpoint": "block", **TILES},
    "chunks": {"checkpoint": "block+attention", "head_chunks": "auto", **TILES},
}
CASES = [*product(MODELS, PARTS)]
S = 2048


def make(kind: str, layers: int = 3) -> Callable[[], nn.Module]:
    sizes = {**SIZES, **MODELS[kind], "num_hidden_layers": layers}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    name = f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    return lambda: getattr(transformers, name)(config)


def scene(parts: dict[str, Any], seq_len: int = S, sp_size: int = 2) -> Scene:
    return Scene(seq_len, sp_size, MemoryConfig(**parts))


@pytest.mark.parametrize("ulysses", [1, 2])
def test_gathered_keys_are_counted(ulysses):
    wanted = Scene(S, 4, ulysses=ulysses)
    found = lab("Llama", workspace=cpu_kernel).rehearse(wanted).peak
    peak = allocated(drop_gradients(make("Llama")().train()), wanted)
    assert peak == pytest.approx(found, rel=1e-3)
    # The control: a rank that exchanges heads alone does not hold all keys.
    assert lab("Llama", workspace=cpu_kernel).rehearse(Scene(S, 4)).peak < 0.9 * found


@pytest.mark.parametrize("parts", ["plain", "chunks"])
@pytest.mark.parametrize("ulysses", [1, 2])
def test_the_rank_that_is_rehearsed_takes_the_most(ulysses, parts, monkeypatch):
    wanted = Scene(S, 4, MemoryConfig(**PARTS[parts]), ulysses=ulysses)
    peaks = []
    for rank in range(4):
        monkeypatch.setattr(Scene, "rank", rank)
        peaks.append(lab("Llama").rehearse(wanted).peak)
    monkeypatch.undo()
    assert lab("Llama").rehearse(wanted).peak >= max(peaks) * 0.999


def drop_gradients(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    return model


def allocated(model: nn.Module, wanted: Scene) -> int:
    """The most bytes above those of the model, by the reports of torch's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, on_fake_tensors(HostBytes()):
        measure_step(model, call_with_labels, wanted, Meter())
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def cpu_kernel(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes of the scores and their gradients that the backward of torch's CPU kernel holds, a block for each thread.

    Source: torch ``aten/src/ATen/native/cpu/FlashAttentionKernel.cpp``, ``cpu_flash_attention_backward``.
    """
    if "flash_attention_for_cpu_backward" not in str(func):
        return 0
    queries, keys = args[1].shape[2], args[2].shape[2]
    block = min(queries, 256 if queries >= 768 else 64 if queries >= 192 else 32)
    return 4 * torch.get_num_threads() * block * (2 * min(keys, 512) + 1)


def lab(kind: str, layers: int = 3, workspace: Workspace | None = None) -> Lab:
    return Lab(make(kind, layers), dtype=torch.float32, workspace=workspace)


@pytest.mark.parametrize("case", sampled(CASES, every=5, keep=[("GPT2", "chunks"), ("Llama", "tiled")]))
def test_the_lab_counts_what_the_allocator_counts(case):
    kind, parts = case
    wanted = scene(PARTS[parts])
    found = lab(kind, workspace=cpu_kernel).rehearse(wanted).peak
    peak = allocated(drop_gradients(make(kind)().train()), wanted)
    # States of random numbers, which checkpoints keep on the host of a GPU.
    states = 8 * torch.get_rng_state().numel() if wanted.memory.is_on else 0
    assert -1e-3 * peak <= peak - found <= 1e-3 * peak + states


@pytest.mark.parametrize("parts", PARTS)
def test_fake_tensors_count_as_real_ones(parts):
    wanted = scene(PARTS[parts], seq_len=512)
    meter = Meter(rounding=512)
    with on_fake_tensors(HostBytes()):
        measure_step(drop_gradients(make("Llama")().train()), call_with_labels, wanted, meter)
    assert lab("Llama").rehearse(wanted).peak == meter.peak


@pytest.mark.parametrize(
    ("heads", "kv_heads", "chunks"),
    [(8, 4, 4), (32, 2, 16), (32, 4, 16), (24, 24, "auto"), (32, 8, 5)],
    ids=["two of a key", "sixteen of a key", "eight of a key", "a key each", "uneven"],
)
def test_some_tiles_and_chunks_take_what_all_of_them_take(heads, kv_heads, chunks):
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": 16 * heads, "head_dim": 16}
    config = transformers.LlamaConfig(**SIZES | sizes, num_hidden_layers=2)
    made = Lab(lambda: transformers.LlamaForCausalLM(config))
    wanted = scene({**PARTS["chunks"], "checkpoint": "block", "head_chunks": chunks, "tile_bytes": 2**18}, 2048)
    assert made.rehearse(wanted).peak == made.rehearse(wanted, all_tiles=True).peak


@pytest.mark.parametrize("parts", [*PARTS.values(), {**PARTS["tiled"], "offload": "cpu"}], ids=[*PARTS, "offload"])
def test_four_blocks_tell_what_more_of_them_take(parts):
    wanted = scene(parts, seq_len=1024, sp_size=4)
    more = lab("Llama", layers=6).rehearse(wanted)
    found = lab("Llama", layers=BLOCKS).rehearse(wanted)
    assert found.on_device(6) == pytest.approx(more.peak, rel=1e-3)
    assert found.on_host(6) == more.on_host(6)


@pytest.mark.parametrize("parts", PARTS)
def test_what_does_not_grow_is_told_by_shapes(parts):
    made, at = lab("Llama"), {**PARTS[parts], **({"tile_bytes": 2**17} if parts in ("tiled", "chunks") else {})}
    once, twice = (made.rehearse(scene(at, seq_len)) for seq_len in (5000, 10000))
    assert once.fixed is not None
    assert once.fixed + 2 * (once.peak - once.fixed) == pytest.approx(twice.peak, rel=2e-3)
    # Here S_r is that of hidden states.
    assert made.rehearse(scene(at, 256)).fixed is None


@pytest.mark.parametrize("parts", ["plain", "chunks"])
def test_peaks_grow_linearly(parts):
    made, at = lab("Llama"), {**PARTS[parts], **({"tile_bytes": 2**17} if parts == "chunks" else {})}
    first, second, fourth = (made.rehearse(scene(at, seq_len)).peak for seq_len in (4096, 8192, 16384))
    assert fourth - second == pytest.approx(2 * (second - first), rel=1e-2)


def test_a_tensor_that_is_held_is_counted():
    """The control of all others: what a step holds beyond need shows in its peak."""
    held = []

    def hold(model: nn.Module, batch: Any) -> torch.Tensor:
        hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state
        held.append(hidden.detach().clone())
        return model(input_ids=batch["input_ids"], labels=batch["labels"]).loss

    wanted = scene(PARTS["tiled"], seq_len=1024)
    plain = lab("Llama").rehearse(wanted).peak
    more = Lab(make("Llama"), hold, torch.float32, None).rehearse(wanted).peak
    assert more >= plain + 512 * 128 * 4


class Pinned(offload.PlainCopies):
    """Copies on a CPU into buffers as large as pinned ones."""

    def buffer(self, size: int) -> torch.Tensor:
        return torch.empty(self.footprint(size), dtype=torch.uint8)

    def footprint(self, size: int) -> int:
        return footprint(size, torch.device("cuda"))


def test_bytes_on_the_host_are_those_that_offload_takes(monkeypatch):
    parts = {"checkpoint": "block+attention", "offload": "cpu"}
    wanted, pools = scene(parts, seq_len=1030, sp_size=2), []
    original = offload.HostPool

    def pool(*args: Any) -> Any:
        pools.append(original(*args))
        return pools[-1]

    found = lab("Llama", layers=4).rehearse(wanted).on_host(4)
    monkeypatch.setattr(offload, "HostPool", pool)
    with on_fake_tensors(HostBytes()):
        monkeypatch.setattr(offload, "copies_for", lambda device: Pinned())
        measure_step(drop_gradients(make("Llama", 4)().train()), call_with_labels, wanted, Meter())
    assert found == sum(each.bytes for each in pools) > 0
