"""Attention in chunks of heads against attention on the whole sequence in one process, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from chunk_steps import MASKS, D, join_world, numbers, step, worst
from nightly import mostly
from torch import Tensor

from lightning_ulysses import UlyssesError
from lightning_ulysses.attention import MaskSpec, attend
from lightning_ulysses.attention.attend import Softmax
from lightning_ulysses.attention.chunked import HeadChunks, exchanged_by_chunks
from lightning_ulysses.attention.explicit import Extras
from lightning_ulysses.attention.ulysses import exchanged
from lightning_ulysses.context import LocalBatch
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.distance import largest
from lightning_ulysses.geometry.head_chunks import head_chunks, most_chunks
from lightning_ulysses.geometry.heads import head_layout
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.testing.processes import ProcessPool

HEADS = [(8, 2), (6, 6), (6, 3), (7, 1), (8, 8), (9, 3), (12, 4), (10, 5), (4, 2)]


def sweep(rank: int, size: int) -> dict[str, float]:
    """Each number of heads in each number of chunks."""
    mesh, errors = join_world(rank, size), {}
    for heads in HEADS:
        for count in range(1, most_chunks(heads[0], size) + 1):
            for overlaps in (False, True):
                spec = MaskSpec(count % 2 == 0, num_padding=count % 3)
                errors[f"{heads} in {count}, {overlaps}"] = step(mesh, heads, HeadChunks(count, overlaps), spec)
    return errors


@pytest.mark.parametrize("size", [2, 3, 4])
def test_heads_over_ranks_in_chunks(pool: ProcessPool, size: int) -> None:
    for errors in pool.run(sweep, size, world_size=size):
        assert len(errors) >= 30 and largest(errors.values()) <= 1e-12, errors


def masks(rank: int, size: int) -> dict[str, float]:
    """Each kind of mask, with each thing that can be added to it."""
    mesh, errors = join_world(rank, size), {}
    for name, spec in MASKS.items():
        for number, heads in enumerate(((7, 1), (12, 4), (6, 6))):
            per_head = torch.linspace(0.3, 1.2, heads[0], dtype=torch.float64)
            added = {
                "plain": {},
                "again": {"repeats": True},
                "softcap": {"extras": Extras(0.7)},
                "sinks": {"extras": Extras(sinks=per_head.clone().requires_grad_())},
                "alibi": {"extras": Extras(alibi_slopes=per_head.clone().requires_grad_()), "repeats": True},
                "bias": {"bias": numbers(3, 1, heads[0], 13, 13).requires_grad_()},
                "one bias": {"bias": numbers(4, 2, 1, 13, 13) > -0.5},
            }
            for what, settings in list(added.items())[number % 2 :: 2] if number else added.items():
                count = 2 if size > 2 else 3
                chunks = HeadChunks(count, overlaps=number == 1)
                errors[f"{name}, {what}, {heads}"] = step(mesh, heads, chunks, spec, rows=2, **settings)
    return errors


@pytest.mark.parametrize("size", mostly([2, 3], [2]))
def test_masks_and_extras(pool: ProcessPool, size: int) -> None:
    for errors in pool.run(masks, size, world_size=size):
        assert len(errors) > 100 and largest(errors.values()) <= 1e-12, errors


class Late:
    """A collective that runs when it is waited for: whoever reads or writes its tensors before gets wrong numbers."""

    def __init__(self, run: Any, events: list[str]) -> None:
        self._run, self._events = run, events

    def wait(self) -> None:
        self._events.append("wait")
        self._run()


@contextmanager
def late_exchanges(events: list[str]) -> Iterator[None]:
    """Takes note of when exchanges begin and are waited for, and of attention in between."""
    original, attends = dist.all_to_all_single, Softmax.attend

    def send(*args: Any, async_op: bool = False, **settings: Any) -> Any:
        events.append("begin")
        if async_op:
            # Memory that was freed may hold the right numbers, or none.
            (args[0] if args else settings["output"]).fill_(7.0)
            return Late(lambda: original(*args, **settings), events)
        return original(*args, **settings)

    def attend(self: Softmax, *args: Any) -> Tensor:
        events.append("attend")
        return attends(self, *args)

    with mock.patch.object(dist, "all_to_all_single", send), mock.patch.object(Softmax, "attend", attend):
        yield


def order(rank: int, size: int, overlaps: bool) -> tuple[float, list[str]]:
    mesh, events = join_world(rank, size), []
    with late_exchanges(events):
        error = step(mesh, (6, 6), HeadChunks(3, overlaps), MaskSpec(True))
    return error, events


def test_order_of_exchanges(pool: ProcessPool) -> None:
    """Each begins before the attention of the chunk before it and ends after it, with the same numbers."""
    for error, events in pool.run(order, 2, True, world_size=2):
        assert error <= 1e-12
        letters = "".join(event[0] for event in events)
        # The forward: k and v, and q, of the next chunk; attention; the output of the chunk before it; its own.
        forward = "bb" + "wwbb" + "ab" + "wwbb" + "awb" + "ww" + "awb" + "w"
        # The backward: k and v, q, the output and its gradient; attention; gradients of q, k and v.
        backward = "bbbb" + "wwwwbbbb" + "abbb" + "wwwwbbbb" + "awwwbbb" + "wwww" + "awwwbbb" + "www"
        assert letters == forward + backward
        assert letters.count("b") == letters.count("w")


def test_without_overlap_nothing_is_left_waiting(pool: ProcessPool) -> None:
    for error, events in pool.run(order, 2, False, world_size=2):
        assert error <= 1e-12 and "wait" not in events
        assert "".join(event[0] for event in events) == "bbab" * 3 + "bbbbabbb" * 3


def test_too_early_is_seen(pool: ProcessPool) -> None:
    """The negative control: without waiting, the numbers are wrong."""
    assert all(error > 1e-3 for error in pool.run(never_waiting, 2, world_size=2))


def never_waiting(rank: int, size: int) -> float:
    mesh, events = join_world(rank, size), []
    with mock.patch.object(Late, "wait"), late_exchanges(events):
        return step(mesh, (6, 6), HeadChunks(3, True), MaskSpec(True))


class Hidden:
    """A user's function, as `flex_attention` gets them."""

    learned = None
    grows = False

    def __init__(self, bias: Tensor) -> None:
        self.bias = bias

    def given(self, learned: Any) -> Hidden:
        return self

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, heads: slice, kv_index: Any, mesh: SequenceMesh, first: int
    ) -> Tensor:
        return attend(q, k, v, MaskSpec(False), kv_index=kv_index, bias=self.bias[:, heads], first=first)


def hidden(rank: int, size: int) -> list[Any]:
    mesh, layout = join_world(rank, size), SequenceLayout(13, size)
    found: list[Any] = []
    for kind in ("constant", "learned", "computed"):
        bias = numbers(3, 1, 4, 13, 13).requires_grad_(kind != "constant")
        meaning = Hidden(bias * 2 if kind == "computed" else bias)
        local = [numbers(i, 1, 4, 13, D)[:, :, layout.spans[rank]].requires_grad_() for i in range(3)]
        try:
            out = exchanged_by_chunks(LocalBatch(layout), *local, meaning, mesh, HeadChunks(2))
        except UlyssesError as error:
            found.append(str(error))
            continue
        wanted = exchanged(LocalBatch(layout), *local, meaning, mesh)
        pairs = [torch.autograd.grad(each.square().sum(), local) for each in (out, wanted)]
        found.append(worst([*zip(*pairs, strict=True)]))
    return found


def test_a_function_of_the_user(pool: ProcessPool) -> None:
    for error, *refusals in pool.run(hidden, 2, world_size=2):
        assert error <= 1e-12
        assert all("score_mod" in refusal and "set head_chunks=1" in refusal for refusal in refusals)


def refused(rank: int, size: int) -> list[str]:
    mesh, words = join_world(rank, size), []
    for heads, count, length in ((7, 4, 13), (2, 2, 13), (1, 2, 13), (7, 2, 5)):
        layout = SequenceLayout(13, size)
        q, k, v = (torch.zeros(1, heads, length, D)[:, :, layout.spans[rank]] for _ in range(3))
        with pytest.raises(UlyssesError) as raised:
            exchanged_by_chunks(LocalBatch(layout), q, k, v, Softmax(MaskSpec(True)), mesh, HeadChunks(count))
        words.append(str(raised.value))
    return words


def test_what_is_refused(pool: ProcessPool) -> None:
    for seven, two, one, short in pool.run(refused, 2, world_size=2):
        assert "head_chunks=4" in seven and "7 query heads" in seven and "set head_chunks=3" in seven
        assert "set head_chunks=1" in two and "set head_chunks=1" in one and "Got attention over" in short


@pytest.mark.parametrize("heads", [*HEADS, (13, 1), (64, 8)])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_chunks_cover_all_heads_once(heads: tuple[int, int], size: int) -> None:
    layout = head_layout(*heads, size)
    for count in range(1, most_chunks(heads[0], size) + 1):
        chunks = head_chunks(*heads, size, count)
        assert len(chunks) == count
        for rank in range(size):
            for what, wanted in (("query_ranges", layout.query_ranges), ("new_ranges", layout.kv_ranges),
                                 ("done_ranges", layout.kv_ranges)):  # fmt: skip
                ranges = [getattr(chunk, what)[rank] for chunk in chunks]
                assert [head for first, last in ranges for head in range(first, last)] == [*range(*wanted[rank])]
            for chunk in chunks:
                (begin, end), (first, last) = chunk.query_ranges[rank], chunk.kv_ranges[rank]
                assert begin < end and (first, last) == (begin // layout.group_size, (end - 1) // layout.group_size + 1)


@pytest.mark.parametrize("count", ["auto", 3])
def test_number_of_chunks(count: Any) -> None:
    assert HeadChunks(count).of(7, 2) == 3


def test_without_gradients_nothing_is_kept(pool: ProcessPool) -> None:
    assert pool.run(without_gradients, 2, world_size=2) == [[True, True, True]] * 2


def without_gradients(rank: int, size: int) -> list[bool]:
    mesh, layout = join_world(rank, size), SequenceLayout(13, size)
    local = [numbers(i, 1, 4, layout.shares[rank], D) for i in range(3)]
    arguments = (LocalBatch(layout), *local, Softmax(MaskSpec(True)), mesh)
    wanted = exchanged(*arguments)
    plain = exchanged_by_chunks(*arguments, HeadChunks(2))
    local[1].requires_grad_()
    with torch.no_grad():
        off = exchanged_by_chunks(*arguments, HeadChunks(2, True))
    on = exchanged_by_chunks(*arguments, HeadChunks(2))
    return [
        torch.allclose(out, wanted) and out.requires_grad == grad
        for out, grad in ((plain, False), (off, False), (on, True))
    ]
