"""Checkpointed blocks: a step on several processes against one process without checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from exact import BOUND
from models import VOCAB, HandWritten, LlamaModule, count_targets, pair_batch, token_batch
from nightly import mostly, sampled
from planned import lit, text_batches
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import ZOO, Specimen, shifted, targets_of

import lightning_ulysses
from lightning_ulysses import UlyssesError
from lightning_ulysses.exchange import all_to_all
from lightning_ulysses.memory import checkpointed
from lightning_ulysses.testing import SplitRun, compare, fit_rank, fit_single, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool

TILED: dict[str, Any] = {"tiled_loss": True, "tiled_mlp": True, "tiled_norm": True, "tile_tokens": 3}
BLOCK: dict[str, Any] = {"checkpoint": "block"}
KEPT: dict[str, Any] = {"checkpoint": "block+attention"}
OFFLOADED: dict[str, Any] = {**KEPT, "offload": "cpu"}
TWO: dict[str, Any] = {"accumulate_grad_batches": 2}
SEED = 5


class Adapted(LlamaModule):
    """LoRA: the first block gets an input without a gradient."""

    def __init__(self) -> None:
        import peft

        super().__init__()
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        self.model = peft.get_peft_model(self.model, config)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Gemma2(LlamaModule):
    """Attention with a softcap, which no kernel of the CPU computes, and windows."""

    def __init__(self) -> None:
        from transformers import Gemma2Config, Gemma2ForCausalLM

        super().__init__(lr=0.1)
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 6}
        self.model = Gemma2ForCausalLM(Gemma2Config(vocab_size=VOCAB, attn_implementation="eager", **sizes, **heads))


class Encoder(HandWritten):
    """torch's own layers, with dropout in and behind attention."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        layer = nn.TransformerEncoderLayer(32, 4, 48, p, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x) + self.place(lightning_ulysses.sequence_positions(x))))


class Dropping(HandWritten):
    """Dropout behind attention and in the MLP."""

    def __init__(self, compiled: bool = False) -> None:
        super().__init__(kv_heads=2)
        for block in self.blocks:
            block.mlp = nn.Sequential(block.mlp, nn.Dropout(0.2))
            block.out = nn.Sequential(block.out, nn.Dropout(0.2))
            if compiled:
                block.compile(backend="eager")


class Packed(LlamaModule):
    """Documents are looked for where there is no cache."""

    def __init__(self) -> None:
        super().__init__(heads=6, kv_heads=3)
        self.model.config.use_cache = False


def packed() -> Any:
    positions, batch = torch.cat([torch.arange(9), torch.arange(4), torch.arange(20)]).expand(2, -1), batches(1)[0]
    # A document does not end with the first token of the next one.
    return {**batch, "labels": batch["labels"].masked_fill(positions == 0, -100), "position_ids": positions.clone()}


def batches(count: int) -> list[Any]:
    return [token_batch(seed, 33, 2, "uneven") for seed in range(count)]


def run(stage: int, memory: dict[str, Any], trainer: Any = None, **settings: Any) -> SplitRun:
    return SplitRun(strategy={"stage": stage, "memory": memory, **settings}, trainer=trainer or {})


PAIRS = [pair_batch(seed, 33, 2, "uneven") for seed in range(2)]
CASES: dict[str, tuple[Any, list[Any], SplitRun, int]] = {
    "stage 1, blocks, accumulation": (LlamaModule, batches(2), run(1, BLOCK, TWO), 1),
    "stage 2, attention, two steps": (LlamaModule, batches(2), run(2, KEPT), 2),
    "stage 3, offload, accumulation, two steps": (LlamaModule, batches(4), run(3, OFFLOADED, TWO), 2),
    "stage 3, blocks, offload": (LlamaModule, batches(1), run(3, {**BLOCK, "offload": "cpu"}), 1),
    "stage 3, everything on tiles": (LlamaModule, batches(1), run(3, {**OFFLOADED, **TILED}), 1),
    "documents, odd heads, everything on tiles": (Packed, [packed()], run(2, {**OFFLOADED, **TILED}), 1),
    "LoRA at stage 3": (Adapted, batches(1), run(3, OFFLOADED), 1),
    "softcap and windows": (Gemma2, batches(1), run(2, OFFLOADED), 1),
    "split inside at stage 3": (LlamaModule, batches(1), run(3, OFFLOADED, split="blocks"), 1),
    "a plan": (lit(), text_batches(1), run(2, OFFLOADED, plan="litgpt"), 1),
    "layers of torch": (Encoder, PAIRS[:1], run(3, OFFLOADED), 1),
    "by hand, dropout": (Dropping, PAIRS[:1], run(2, OFFLOADED), 1),
    "by hand, dropout, compiled": (partial(Dropping, True), PAIRS[:1], run(2, OFFLOADED), 1),
    "by hand, split inside, dropout": (Dropping, PAIRS[:1], run(2, OFFLOADED, split="blocks"), 1),
    "three ranks": (LlamaModule, batches(1), SplitRun(3, 3, {"memory": OFFLOADED}), 1),
    "two groups": (LlamaModule, batches(2), SplitRun(4, 2, {"stage": 3, "memory": OFFLOADED}), 1),
}


@contextmanager
def small() -> Iterator[None]:
    """Also small tensors wait on the host."""
    with mock.patch("lightning_ulysses.memory.offload._LEAST", 0):
        yield


def fit(rank: int, make: Any, data: list[Any], settings: SplitRun, replaced: dict[str, Any]) -> Any:
    L.seed_everything(SEED, verbose=False)
    with small(), ExitStack() as stack:
        for target, replacement in replaced.items():
            stack.enter_context(mock.patch(target, replacement))
        return fit_rank(rank, make, data, settings)


def differences(pool: ProcessPool, name: str, **replaced: Any) -> list[float]:
    make, data, settings, steps = CASES[name]
    size, groups = math.ceil(len(data) / steps), settings.world_size // settings.sp_size
    windows = [data[i : i + size] for i in range(0, len(data), size)]
    wanted = fit_single(make, windows, count_targets, seed=SEED, dp_size=groups)
    assert wanted.step().norm() > 1e-3
    found = pool.run(fit, make, data, settings, replaced, world_size=settings.world_size)
    return [compare(result, wanted).largest for result in found]


SELDOM = ("stage 1, blocks, accumulation", "stage 3, blocks, offload", "two groups")


@pytest.mark.parametrize("name", mostly(CASES, SELDOM))
def test_step(pool: ProcessPool, name: str) -> None:
    assert max(differences(pool, name)) <= BOUND


EXACT = [name for name in ZOO if ZOO[name].exact]


@pytest.mark.parametrize("name", sampled(EXACT, 12, ["OlmoHybridForCausalLM"]))
def test_architectures(pool: ProcessPool, name: str) -> None:
    data, make = [token_batch(1, 33, 2, "uneven")], partial(Specimen, name)
    wanted = fit_single(make, [[shifted(batch) for batch in data]], partial(targets_of, name), seed=SEED)
    for result in pool.run(fit, make, data, run(2, OFFLOADED), {}, world_size=2):
        assert compare(result, wanted).largest <= BOUND


def nothing(part: Any, out: Tensor) -> Tensor:
    return torch.zeros_like(out).as_strided(part.size, part.stride)


def uncopied(self: Any, target: Tensor, source: Tensor) -> None:
    target.zero_()


CONTROLS: dict[str, dict[str, Any]] = {
    "the output of attention": {"lightning_ulysses.attention.repeated._View.of": nothing},
    "the copies": {"lightning_ulysses.memory.offload.PlainCopies.start": uncopied},
}


@pytest.mark.parametrize("name", CONTROLS)
def test_without_what_is_kept_it_is_wrong(pool: ProcessPool, name: str) -> None:
    """The negative controls."""
    found = differences(pool, "stage 3, offload, accumulation, two steps", **CONTROLS[name])
    assert min(found) > 100 * BOUND


class Counts(TorchDispatchMode):
    """What one step of two layers runs."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.exchanges = self.repeated = self.mlps = 0
        self.is_repeated = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.kernels += "attention" in str(func) and "backward" not in str(func)
        return func(*args, **(kwargs or {}))

    @contextmanager
    def again(self, states: Any) -> Iterator[None]:
        self.is_repeated = True
        try:
            yield
        finally:
            self.is_repeated = False

    def exchange(self, *args: Any) -> None:
        self.exchanges += 1
        self.repeated += self.is_repeated
        EXCHANGE(*args)

    def mlp(self, *args: Any) -> None:
        self.mlps += 1


EXCHANGE = all_to_all._exchange


def counts(rank: int, memory: dict[str, Any]) -> tuple[int, ...]:
    count, module = Counts(), LlamaModule()
    for layer in module.model.model.layers:
        layer.mlp.register_forward_pre_hook(count.mlp)
    settings = run(2, memory, check_model=False)
    with (
        mock.patch.object(all_to_all, "_exchange", count.exchange),
        mock.patch.object(checkpointed, "_drawing", count.again),
        small(),
        count,
    ):
        split_trainer(settings).fit(module, split_loader(batches(1), settings, rank))
    return count.kernels, count.exchanges, count.repeated, count.mlps


def test_what_runs_in_a_step(pool: ProcessPool) -> None:
    """Of two layers: kernels forward, exchanges, those of blocks that are computed again, and calls of MLPs."""
    wanted = {
        "none": (2, 8, 0, 2),
        "block": (4, 12, 4, 4),
        # Queries, keys and values, and the output, are exchanged again in the backward of attention.
        "block+attention": (2, 12, 0, 4),
    }
    for kind, numbers in wanted.items():
        assert pool.run(counts, {"checkpoint": kind}, world_size=2) == [numbers] * 2


class Kept(LlamaModule):
    """Notes the bytes that live between forward and backward of its second step, and did not before it."""

    kept = 0

    def __init__(self) -> None:
        super().__init__(layers=3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        from memory import MemoryCount

        with MemoryCount() as count:
            count.hold(*self.parameters(), *self.buffers(), *batch.values())
            before = count.now
            loss = super().training_step(batch, batch_idx)
            self.kept = count.now - before
        return loss


def kept_bytes(rank: int, memory: dict[str, Any]) -> int:
    module, settings = Kept(), run(2, {**memory, "tiled_loss": True, "tile_tokens": 8}, check_model=False)
    split_trainer(settings).fit(module, split_loader([token_batch(seed, 256, 1) for seed in range(2)], settings, rank))
    return module.kept


def test_kept_bytes(pool: ProcessPool) -> None:
    """Of each block its input; with attention its output as well, and one number for each head and token."""
    none, block, attention = (
        pool.run(kept_bytes, {"checkpoint": kind}, world_size=2) for kind in ("none", "block", "block+attention")
    )
    hidden, sums = 128 * 32 * 4, 2 * 256 * 4
    assert attention[0] - block[0] == attention[1] - block[1] == 3 * (hidden + sums)
    # Positions, and what the last norm and the loss keep, are the same with and without.
    assert all(3 * hidden <= each <= 8 * hidden for each in block) and none[0] > 40 * hidden


def refusal(rank: int, make: Any) -> str:
    with pytest.raises(UlyssesError) as caught:
        fit_rank(rank, make, batches(1), run(2, BLOCK))
    return str(caught.value)


class Twice(LlamaModule):
    def __init__(self) -> None:
        super().__init__()
        self.model.gradient_checkpointing_enable()


def test_blocks_that_are_checkpointed_already(pool: ProcessPool) -> None:
    for text in pool.run(refusal, Twice, world_size=2):
        assert "gradient_checkpointing is on" in text


def test_by_hand_already(pool: ProcessPool) -> None:
    for text in pool.run(refusal, partial(ByHand), world_size=2):
        assert "'blocks.0'" in text and "torch.utils.checkpoint" in text


class ByHand(HandWritten):
    def __init__(self) -> None:
        super().__init__(checkpointing=True)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch["input_ids"], batch["labels"]), batch_idx)
