"""Steps whose attention runs in chunks of heads: on several processes against one process without them."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from exact import BOUND, check, fit_broken
from models import HandWritten, LlamaModule, count_targets, pair_batch, token_batch
from nightly import mostly
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_ulysses
from lightning_ulysses import UlyssesError
from lightning_ulysses.attention.chunked import HeadChunks
from lightning_ulysses.context import current_context
from lightning_ulysses.testing import SplitRun, compare, fit_rank, fit_single, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool

CHUNKS = {"head_chunks": 2}
OVERLAP = {"head_chunks": "auto", "overlap": True}
ACCUMULATE: dict[str, Any] = {"accumulate_grad_batches": 2}


class Checkpointed(LlamaModule):
    def __init__(self, use_reentrant: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})


class Uncached(LlamaModule):
    """With a cache, transformers takes no documents from positions in one process."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.model.config.use_cache = False


class Sinks(HandWritten):
    """Attention with parameters of its own, and a softcap."""

    def __init__(self) -> None:
        super().__init__(heads=6, kv_heads=3)
        self.sinks = torch.nn.Parameter(torch.linspace(-1, 1, 6))
        for block in self.blocks:
            block.attend = self.attend  # type: ignore[assignment]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lightning_ulysses.ulysses_attention(q, k, v, is_causal=True, softcap=2.0, sinks=self.sinks, window=9)


def packed(seed: int) -> dict[str, Tensor]:
    """Three documents in a row."""
    positions = torch.cat([torch.arange(length) for length in (5, 17, 11)]).unsqueeze(0)
    batch = token_batch(seed, 33, 1, "uneven")
    # The first token of a document is not predicted from another one.
    return {**batch, "labels": batch["labels"].masked_fill(positions == 0, -100), "position_ids": positions}


def batches(count: int) -> list[Any]:
    return [token_batch(seed, 33, 2, "uneven") for seed in range(count)]


def run(memory: dict[str, Any], stage: int = 2, trainer: dict[str, Any] | None = None, **strategy: Any) -> SplitRun:
    return SplitRun(strategy={"stage": stage, "memory": memory, **strategy}, trainer=trainer or {})


CASES: dict[str, tuple[Any, list[Any], SplitRun, int]] = {
    "stage 1, accumulation": (LlamaModule, batches(2), run(CHUNKS, 1, ACCUMULATE), 1),
    "stage 2, odd heads, two steps": (
        partial(LlamaModule, heads=7, kv_heads=1), batches(2), run({"head_chunks": 3}), 2,
    ),
    "stage 3, overlap, accumulation, checkpoints": (
        partial(Checkpointed, heads=9, kv_heads=3), batches(2), run(OVERLAP, 3, ACCUMULATE), 1,
    ),
    "reentrant checkpoints": (partial(Checkpointed, use_reentrant=True), batches(1), run(CHUNKS), 1),
    "packed, stage 3, checkpoints": (partial(Checkpointed, kv_heads=4), [packed(0)], run(CHUNKS, 3), 1),
    "a window, packed, overlap": (partial(Uncached, window=6), [packed(1)], run(OVERLAP), 1),
    "sinks at stage 3": (Sinks, [pair_batch(1, 33, 2, "uneven")], run(OVERLAP, 3), 1),
    "split inside at stage 3": (LlamaModule, batches(1), run(CHUNKS, 3, split="blocks"), 1),
    "with tiles": (LlamaModule, batches(1), run({**CHUNKS, "tiled_loss": True, "tile_tokens": 5}), 1),
    "kept over checkpoints, stage 3": (
        partial(LlamaModule, heads=9, kv_heads=3), batches(2),
        run({**OVERLAP, "checkpoint": "block+attention", "offload": "cpu"}, 3, ACCUMULATE), 1,
    ),
    "dropped by checkpoints, packed": (
        partial(Uncached, kv_heads=4), [packed(2)], run({**CHUNKS, "checkpoint": "block"}), 1,
    ),
    "two groups": (
        partial(LlamaModule, heads=8), batches(2),
        SplitRun(4, 2, strategy={"memory": {"head_chunks": 4, "overlap": True}}), 1,
    ),
}  # fmt: skip


SELDOM = (
    "stage 1, accumulation",
    "reentrant checkpoints",
    "packed, stage 3, checkpoints",
    "kept over checkpoints, stage 3",
)


@pytest.mark.parametrize("name", mostly(CASES, SELDOM))
def test_step(pool: ProcessPool, name: str) -> None:
    make, data, settings, steps = CASES[name]
    check(pool, make, data, settings, steps)


def only_the_first(self: Any, grads: Any, num_done: int) -> Any:
    """Loses the gradient of key/value heads that an earlier chunk has."""
    return [grad[:, :num_done] for grad in grads]


def test_a_lost_gradient_is_seen(pool: ProcessPool) -> None:
    """The negative control: the chunks of a rank share a key/value head."""
    make, data = partial(LlamaModule, kv_heads=1), batches(1)
    wanted = fit_single(make, [data], count_targets)
    target = "lightning_ulysses.attention.held_heads.HeldGradients.add"
    found = pool.run(fit_broken, make, data, run(CHUNKS), target, only_the_first, world_size=2)
    assert all(compare(each, wanted).step > 100 * BOUND for each in found)


class Seen(LlamaModule):
    """Fails unless attention is cut during a step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        context = current_context()
        assert context is None or context.notes.of(HeadChunks) == HeadChunks(2, True)
        return super().training_step(batch, batch_idx)


def counts_after(rank: int) -> int:
    strategy = {"memory": {"head_chunks": 2, "overlap": True}}
    trainer = split_trainer(SplitRun(strategy=strategy))
    strategy_of: Any = trainer.strategy
    trainer.fit(Seen(), split_loader(batches(1), SplitRun(strategy=strategy), rank))
    return int(strategy_of._core.context.notes.of(HeadChunks).count)


def test_all_heads_at_once_after_a_run(pool: ProcessPool) -> None:
    assert pool.run(counts_after, world_size=2) == [1, 1]


def refused(rank: int, heads: int, memory: dict[str, Any], by_hand: bool) -> str:
    make = partial(HandWritten if by_hand else LlamaModule, heads=heads, kv_heads=heads)
    data = [pair_batch(1, 33)] if by_hand else batches(1)
    try:
        fit_rank(rank, make, data, run(memory))
    except UlyssesError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("by_hand", mostly([False, True], [False]))
def test_more_chunks_than_heads(pool: ProcessPool, by_hand: bool) -> None:
    for words in pool.run(refused, 7, {"head_chunks": 4}, by_hand, world_size=2):
        assert "head_chunks=4" in words and "7 query heads" in words and "set head_chunks=3" in words
    # The advice works.
    assert pool.run(refused, 7, {"head_chunks": 3}, by_hand, world_size=2) == ["", ""]


class Counts(TorchDispatchMode):
    """Counts kernels of attention, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        self.backward += "attention" in name and "backward" in name
        self.forward += "attention" in name and "backward" not in name
        return func(*args, **(kwargs or {}))


def costs(rank: int, memory: dict[str, Any]) -> tuple[int, int, int]:
    """Elements that a step exchanges, and its kernels forward and backward."""
    sent, exchange = [], dist.all_to_all_single

    def send(recv: Tensor, tensor: Tensor, *args: Any, **settings: Any) -> Any:
        sent.append(tensor.numel())
        return exchange(recv, tensor, *args, **settings)

    settings = run(memory, check_model=False)
    with mock.patch.object(dist, "all_to_all_single", send), Counts() as count:
        split_trainer(settings).fit(LlamaModule(heads=8), split_loader([token_batch(1, 32)], settings, rank))
    return sum(sent), count.forward, count.backward


def test_kept_attention_sends_no_more_in_chunks(pool: ProcessPool) -> None:
    """Than a checkpoint does whose blocks exchange in their second forward, of two layers."""
    whole, kept, chunks, again = (
        pool.run(costs, {"head_chunks": count, "checkpoint": kind}, world_size=2)
        for kind, count in (("block", 1), ("block+attention", 1), ("block+attention", 4), ("block", 4))
    )
    assert [sent for sent, *_ in whole] == [sent for sent, *_ in kept] == [sent for sent, *_ in chunks]
    assert [kernels for _, *kernels in chunks] == [[8, 8]] * 2 and [kernels for _, *kernels in again] == [[16, 8]] * 2
    assert all(3 * a == 4 * b for (a, *_), (b, *_) in zip(again, chunks, strict=True))
