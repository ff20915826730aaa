"""The exchange against plain indexing of whole tensors, and the collectives of a real model's step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from models import HandWritten, LlamaModule, pair_batch, token_batch
from torch import Tensor

from lightning_ulysses.exchange.all_to_all import _blocks, _sharers, heads_to_seq, seq_to_heads
from lightning_ulysses.geometry.distance import largest
from lightning_ulysses.geometry.heads import head_layout
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.testing import SplitRun, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool

SIZES = [
    # P, S, H, H_kv
    (2, 33, 9, 3),
    (4, 32, 8, 2),
    (3, 10, 5, 5),
    (2, 32, 4, 1),
    (4, 19, 10, 5),
    (3, 3, 3, 1),
    (4, 5, 4, 4),
    (2, 16, 2, 2),
]


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def strided(tensor: Tensor, kind: str) -> Tensor:
    """The same numbers in another order in memory."""
    if kind == "contiguous":
        return tensor
    if kind == "transposed":
        # As models make them: (B, S, H, D) seen as (B, H, S, D)
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    spread = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"))
    spread[..., ::2] = tensor
    return spread[..., ::2]


def worst(pairs: list[tuple[Tensor, Tensor]]) -> float:
    for found, wanted in pairs:
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
    return largest(float((found.double() - wanted.double()).abs().max()) for found, wanted in pairs)


def exchange(rank: int, sizes: tuple[int, int, int, int], rows: int, value_size: int, kind: str) -> float:
    """The largest error of both directions, forward and backward; every rank knows the whole tensors."""
    sp, seq_len, heads, kv_heads = sizes
    dist.init_process_group("gloo", rank=rank, world_size=sp)
    group, layout = dist.group.WORLD, head_layout(heads, kv_heads, sp)
    assert group is not None
    span, shares = SequenceLayout(seq_len, sp).spans[rank], SequenceLayout(seq_len, sp).shares
    shapes = [(heads, 6), (kv_heads, 6), (kv_heads, value_size)]
    whole = [numbers(i, rows, h, seq_len, d) for i, (h, d) in enumerate(shapes)]
    local = [strided(tensor[:, :, span], kind).requires_grad_() for tensor in whole]
    parts = seq_to_heads(*local, layout, shares, rank, group)
    ranges = [layout.query_ranges, layout.kv_ranges, layout.kv_ranges]
    pairs = [(part, tensor[:, slice(*ends[rank])]) for part, tensor, ends in zip(parts, whole, ranges, strict=True)]
    # Weights that differ by rank, so that a gradient sent to the wrong place shows.
    weights = [
        [numbers(100 * peer + i, rows, ends[peer][1] - ends[peer][0], seq_len, d) for peer in range(sp)]
        for i, (ends, (_, d)) in enumerate(zip(ranges, shapes, strict=True))
    ]
    torch.autograd.backward(parts, [strided(each[rank], kind) for each in weights])
    for tensor, each, ends, leaf in zip(whole, weights, ranges, local, strict=True):
        wanted = torch.zeros_like(tensor)
        for peer in range(sp):
            wanted[:, slice(*ends[peer])] += each[peer]
        assert leaf.grad is not None
        pairs.append((leaf.grad, wanted[:, :, span]))
    out = numbers(9, rows, heads, seq_len, value_size)
    mine = strided(out[:, slice(*layout.query_ranges[rank])], kind).requires_grad_()
    back = heads_to_seq(mine, layout, shares, rank, group)
    pairs.append((back, out[:, :, span]))
    gradient = numbers(10, rows, heads, seq_len, value_size)
    back.backward(strided(gradient[:, :, span], kind))
    assert mine.grad is not None
    pairs.append((mine.grad, gradient[:, slice(*layout.query_ranges[rank])]))
    return worst(pairs)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("rows", "value_size", "kind"), [(1, 6, "contiguous"), (2, 4, "transposed"), (2, 9, "spread")])
def test_exchange(pool: ProcessPool, sizes: tuple[int, int, int, int], rows: int, value_size: int, kind: str) -> None:
    assert largest(pool.run(exchange, sizes, rows, value_size, kind, world_size=sizes[0])) <= 1e-12


@pytest.mark.parametrize(("heads", "kv_heads", "sp"), [(64, 8, 16), (64, 64, 16), (64, 1, 16), (32, 8, 4), (12, 6, 12)])
def test_blocks_of_ranks_that_share_heads(heads: int, kv_heads: int, sp: int) -> None:
    """For every set of ranks on the wire, few blocks that hand each rank its range of heads."""
    ranges = head_layout(heads, kv_heads, sp).kv_ranges
    sharers = _sharers(ranges, kv_heads)
    width = ranges[0][1]
    assert sharers * kv_heads == sp * width
    for begin in range(sp):
        for end in range(begin + 1, sp + 1):
            blocks = list(_blocks(range(begin, end), sharers))
            assert [peer for block, _ in blocks for peer in block] == list(range(begin, end)) and len(blocks) <= 3
            for block, count in blocks:
                assert len(block) % count == 0
                for place, peer in enumerate(block):
                    first = (block.start // sharers + place // count) * width
                    assert ranges[peer] == (first, first + width)


def test_ranges_that_are_not_regular_have_no_blocks() -> None:
    assert _sharers(head_layout(9, 3, 2).kv_ranges, 3) == 0
    assert _sharers(head_layout(10, 5, 4).kv_ranges, 5) == 0 and _sharers(head_layout(10, 5, 4).query_ranges, 10) == 0


def round_trip(rank: int, sizes: tuple[int, int, int, int], dtype: torch.dtype) -> list[bool]:
    sp, seq_len, heads, kv_heads = sizes
    dist.init_process_group("gloo", rank=rank, world_size=sp)
    group, layout, shares = dist.group.WORLD, head_layout(heads, kv_heads, sp), SequenceLayout(seq_len, sp).shares
    assert group is not None
    q, k, v = (
        numbers(rank + 5 * i, 2, h, shares[rank], 8, dtype=dtype) for i, h in enumerate((heads, kv_heads, kv_heads))
    )
    q.requires_grad_()
    received, _, _ = seq_to_heads(q, k, v, layout, shares, rank, group)
    back = heads_to_seq(received, layout, shares, rank, group)
    gradient = numbers(rank + 50, 2, heads, shares[rank], 8, dtype=dtype)
    back.backward(gradient)
    assert q.grad is not None
    return [back.dtype == dtype, torch.equal(back, q), torch.equal(q.grad, gradient)]


@pytest.mark.parametrize("sizes", SIZES[:5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_round_trip_is_bit_exact(pool: ProcessPool, sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert pool.run(round_trip, sizes, dtype, world_size=sizes[0]) == [[True] * 3] * sizes[0]


def unused_outputs(rank: int) -> list[float]:
    """Every rank has to take part in the way back, also where only some inputs need a gradient."""
    dist.init_process_group("gloo", rank=rank, world_size=2)
    group = dist.group.WORLD
    assert group is not None
    q, k, v = (numbers(i, 1, 4, 3, 2).requires_grad_(i != 1) for i in range(3))
    received, _, _ = seq_to_heads(q, k, v, head_layout(4, 4, 2), (3, 3), rank, group)
    received.sum().backward()
    assert q.grad is not None and v.grad is not None and k.grad is None
    return [float(q.grad.sum()), float(v.grad.abs().sum())]


def test_outputs_that_nothing_depends_on(pool: ProcessPool) -> None:
    assert pool.run(unused_outputs, world_size=2) == [[24.0, 0.0]] * 2


COLLECTIVES = (
    "all_to_all_single",
    "all_to_all",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "broadcast",
    "broadcast_object_list",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "gather",
    "scatter",
    "send",
    "recv",
    "isend",
    "irecv",
    "batch_isend_irecv",
    "barrier",
)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts the calls of every collective of torch.distributed."""
    calls: Counter[str] = Counter()

    def wrap(name: str) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(mock.patch.object(dist, name, wrap(name)))
        yield calls


class Counting:
    """Notes the collectives of each forward and each backward."""

    calls: Counter[str]
    forward_calls: list[dict[str, int]]
    backward_calls: list[dict[str, int]]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls.clear()
        loss = super().training_step(batch, batch_idx)  # type: ignore[misc]
        self.forward_calls.append(dict(self.calls))
        return loss

    def on_before_backward(self, loss: Tensor) -> None:
        self.calls.clear()

    def on_after_backward(self) -> None:
        self.backward_calls.append(dict(self.calls))


class CountedLlama(Counting, LlamaModule):
    pass


class CountedHandWritten(Counting, HandWritten):
    pass


def fit_counted(rank: int, make: Any, kwargs: dict[str, Any], batches: list[Any], stage: int) -> list[list[Any]]:
    module, run = make(**kwargs), SplitRun(strategy={"stage": stage, "check_model": False})
    module.forward_calls, module.backward_calls = [], []
    with counted() as module.calls:
        split_trainer(run).fit(module, split_loader(batches, run, rank))
    return [module.forward_calls, module.backward_calls]


MODELS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "llama": (CountedLlama, {}, lambda seed: token_batch(seed, 33, 2)),
    "llama with a mask": (
        CountedLlama,
        {},
        lambda seed: {
            **token_batch(seed, 33, 2),
            "attention_mask": (torch.arange(33) < torch.tensor([[33], [20]])).long(),
        },
    ),
    "packed llama": (
        CountedLlama,
        {},
        lambda seed: {**token_batch(seed, 33), "position_ids": torch.arange(33)[None] % 12},
    ),
    "uneven llama": (CountedLlama, {"heads": 9, "kv_heads": 3}, lambda seed: token_batch(seed, 33)),
    "hand-written": (CountedHandWritten, {}, lambda seed: pair_batch(seed, 33)),
    "recomputed": (CountedHandWritten, {"checkpointing": True}, lambda seed: pair_batch(seed, 33)),
}


@pytest.mark.parametrize(("name", "stage"), [*((name, 2) for name in MODELS), ("uneven llama", 1), ("recomputed", 1)])
def test_two_collectives_for_each_attention_call_each_way(pool: ProcessPool, name: str, stage: int) -> None:
    """Nothing else takes place in the forward: none for positions, labels, documents or masks."""
    make, kwargs, batch = MODELS[name]
    layers = 2
    again = 2 * layers if kwargs.get("checkpointing") else 0
    for forward, backward in pool.run(fit_counted, make, kwargs, [batch(1), batch(2)], stage, world_size=2):
        assert forward == [{"all_to_all_single": 2 * layers}] * 2
        assert [calls["all_to_all_single"] for calls in backward] == [2 * layers + again] * 2
        # ZeRO reduces gradients meanwhile, once ranks have told each other which; nothing else is exchanged there.
        assert all(set(calls) <= {"all_to_all_single", "all_reduce", "reduce", "all_gather"} for calls in backward)
        assert [calls["all_gather"] for calls in backward] == [1, 1]
