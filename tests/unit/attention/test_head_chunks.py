"""Attention in chunks of heads against attention on the whole sequence in one process, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from gpu_paths import gpu_paths, varlen_attention
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_ulysses import UlyssesError
from lightning_ulysses.attention import MaskSpec, attend, held_heads
from lightning_ulysses.attention.attend import Softmax
from lightning_ulysses.attention.chunked import HeadChunks, exchanged_by_chunks
from lightning_ulysses.attention.explicit import Extras
from lightning_ulysses.attention.ulysses import exchanged
from lightning_ulysses.context import LocalBatch
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.head_chunks import head_chunks, most_chunks
from lightning_ulysses.geometry.heads import head_layout
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.testing.processes import ProcessPool

D, D_V = 6, 4


def join_world(rank: int, size: int) -> SequenceMesh:
    dist.init_process_group("gloo", rank=rank, world_size=size)
    return SequenceMesh(rank, size, size, rank, 1, 0, sp_group=dist.group.WORLD)


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def worst(pairs: list[tuple[Tensor, Tensor]]) -> float:
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)


def step(
    mesh: SequenceMesh,
    heads: tuple[int, int],
    chunks: HeadChunks,
    spec: MaskSpec,
    rows: int = 1,
    seq_len: int = 13,
    bias: Tensor | None = None,
    extras: Extras | None = None,
    repeats: bool = False,
    value_size: int = D_V,
    on_gpu: bool = False,
    **settings: Any,
) -> float:
    """The largest relative error of the output and of all gradients."""
    layout = SequenceLayout(seq_len, mesh.sp_size)
    span = layout.spans[mesh.sp_rank]
    whole = [
        numbers(i, rows, h, seq_len, d).requires_grad_()
        for i, (h, d) in enumerate(((heads[0], D), (heads[1], D), (heads[1], value_size)))
    ]
    learned = [t for t in (bias, extras and extras.sinks, extras and extras.alibi_slopes) if t is not None]
    learned = [t for t in learned if t.requires_grad]
    weights = numbers(9, rows, heads[0], seq_len, value_size)
    expected = attend(*whole, spec, bias=bias, extras=extras)
    wanted = torch.autograd.grad((expected * weights).sum(), [*whole, *learned])
    local = [t.detach()[:, :, span].clone().requires_grad_() for t in whole]
    batch, meaning = LocalBatch(layout, rows=rows), Softmax(spec, bias, extras=extras, **settings)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return exchanged_by_chunks(batch, q, k, v, meaning, mesh, chunks)

    with gpu_paths() if on_gpu else nullcontext():
        out = checkpoint(call, *local, use_reentrant=False) if repeats else call(*local)
        found = [*torch.autograd.grad((out * weights[:, :, span]).sum(), [*local, *learned])]
    for grad in found[3:]:
        dist.all_reduce(grad)
    pairs = [(out.detach(), expected.detach()[:, :, span])]
    pairs += [(a, b[:, :, span]) for a, b in zip(found[:3], wanted[:3], strict=True)]
    return worst([*pairs, *zip(found[3:], wanted[3:], strict=True)])


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
        assert len(errors) >= 30 and max(errors.values()) <= 1e-12, errors


DOCUMENTS = (((0, 4), (4, 5), (5, 13)),) * 2
MASKS = {
    "causal": MaskSpec(True),
    "both sides": MaskSpec(False),
    "window": MaskSpec(True, window=4),
    "window on both sides": MaskSpec(False, window=4, ahead=2),
    "chunks": MaskSpec(True, chunk=5),
    "packed": MaskSpec(True, documents=DOCUMENTS),
    "packed window": MaskSpec(True, window=3, documents=DOCUMENTS),
    "rows of their own": MaskSpec(True, documents=(DOCUMENTS[0], ((0, 13),))),
    "padding": MaskSpec(True, valid=(((2, 13),), ((0, 9),))),
    "holes": MaskSpec(False, valid=(((0, 3), (5, 11)),) * 2),
    "nothing is seen": MaskSpec(True, valid=((), ((0, 13),))),
}


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


@pytest.mark.parametrize("size", [2, 3])
def test_masks_and_extras(pool: ProcessPool, size: int) -> None:
    for errors in pool.run(masks, size, world_size=size):
        assert len(errors) > 100 and max(errors.values()) <= 1e-12, errors


FLASH = "ulysses_tests::flash_attn"


class Flash:
    """A variable-length kernel of an operator, with the numbers of its forwards and backwards."""

    name = "a stand-in"

    def __init__(self) -> None:
        self.runs = [0, 0]

        @torch.library.custom_op(FLASH, mutates_args=())
        def flash(q: Tensor, k: Tensor, v: Tensor, edges: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
            self.runs[0] += 1
            out = varlen_attention(q, k, v, edges, (left, right), None).contiguous()
            # In place of the log-sum-exp: its backward needs something that only the forward knows.
            return out, q.new_full(q.shape[:2], 7.0)

        def keep(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs[:4], *output)
            ctx.window = inputs[4:]

        def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
            self.runs[1] += 1
            *inputs, edges, out, lse = ctx.saved_tensors
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            with torch.enable_grad():
                again = varlen_attention(*leaves, edges, ctx.window, None)
            assert bool((lse == 7.0).all()) and torch.equal(out, again)
            return *torch.autograd.grad(again, leaves, grad), None, None, None

        flash.register_autograd(backward, setup_context=keep)
        self._function = flash

    def lacks(self, q: Tensor, v: Tensor, kernel: Any) -> str | None:
        return None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: Any, window: tuple[int, int], kernel: Any) -> Tensor:
        out: Tensor = self._function(q, k, v, call.edges, *window)[0]
        return out


def kernels(rank: int, size: int) -> dict[str, float]:
    """A GPU's paths: variable-length calls of an operator, and of a function that torch does not see."""
    mesh, errors = join_world(rank, size), {}
    for name, rows in (("causal", 1), ("causal", 2), ("packed", 1), ("packed window", 2), ("rows of their own", 2)):
        documents = MASKS[name].documents
        spec = replace(MASKS[name], documents=documents and documents[:rows])
        for heads in ((7, 1), (12, 4), (6, 6)):
            flash, count = Flash(), 3
            settings = {"rows": rows, "on_gpu": True, "value_size": D}
            where = f"{name}, {rows}, {heads}"
            errors[where] = step(mesh, heads, HeadChunks(count), spec, flash=flash, **settings)
            # Once for each chunk.
            assert flash.runs == [count, count], flash.runs
            errors[f"{where} by torch"] = step(mesh, heads, HeadChunks(count), spec, **settings)
    return errors


def test_kernels_of_a_gpu(pool: ProcessPool) -> None:
    for errors in pool.run(kernels, 2, world_size=2):
        assert len(errors) == 30 and max(errors.values()) <= 1e-12, errors


class Operators(TorchDispatchMode):
    """Counts the kernels that run."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.forward += "attention" in func.name() and "backward" not in func.name()
        self.backward += "attention_for_cpu_backward" in func.name()
        return func(*args, **(kwargs or {}))


def kernel_runs(rank: int, size: int) -> list[tuple[int, int]]:
    """Kernels in the forward and in the backward: long rows, short ones, packed ones, and again under a checkpoint."""
    mesh, found = join_world(rank, size), []
    for seq_len, documents in ((600, None), (40, None), (40, (((0, 10), (10, 40)),))):
        layout = SequenceLayout(seq_len, size)
        batch, meaning = LocalBatch(layout), Softmax(MaskSpec(True, documents=documents))
        inputs = [numbers(i, 1, h, layout.shares[rank], D).requires_grad_() for i, h in enumerate((8, 2, 2))]
        with Operators() as first:
            out = exchanged_by_chunks(batch, *inputs, meaning, mesh, HeadChunks(4))
        with Operators() as second:
            torch.autograd.grad(out.sum(), inputs)
        found += [(first.forward, first.backward), (second.forward, second.backward)]
    return found


def test_kernels_run_once(pool: ProcessPool) -> None:
    for found in pool.run(kernel_runs, 2, world_size=2):
        assert found == [(4, 0), (0, 4), (4, 0), (0, 4), (8, 0), (0, 8)]


def dropped(rank: int, size: int) -> list[float]:
    """Output and gradients are of the same dropout: attention is linear in v. A second call drops others."""
    mesh, layout = join_world(rank, size), SequenceLayout(13, size)
    batch, meaning, found = LocalBatch(layout), Softmax(MaskSpec(True), dropout_p=0.5), []
    for extras in (None, Extras(0.7)):
        q, k, v = (numbers(i, 1, h, layout.shares[rank], D).requires_grad_() for i, h in enumerate((8, 2, 2)))
        weights = numbers(5 + rank, 1, 8, layout.shares[rank], D)
        torch.manual_seed(3)

        def call(q: Tensor, k: Tensor, v: Tensor, extras: Extras | None = extras) -> Tensor:
            return exchanged_by_chunks(batch, q, k, v, replace(meaning, extras=extras), mesh, HeadChunks(4))

        for out in (call(q, k, v), checkpoint(call, q, k, v, use_reentrant=False)):
            grad = torch.autograd.grad((out * weights).sum(), v)[0]
            sums = torch.stack([(out.detach() * weights).sum(), (grad * v.detach()).sum()])
            dist.all_reduce(sums)
            found += [float((sums[0] - sums[1]).abs() / sums[0].abs()), float(sums[0])]
    return found


def test_dropout_is_repeated(pool: ProcessPool) -> None:
    for found in pool.run(dropped, 2, world_size=2):
        assert max(found[::2]) <= 1e-12 and len(set(found[1::2])) == 4, found


def precision(rank: int, size: int) -> list[float]:
    """Under autocast: the gradients against those of all heads at once."""
    mesh, layout = join_world(rank, size), SequenceLayout(32, size)
    batch, meaning = LocalBatch(layout), Softmax(MaskSpec(True), extras=Extras(0.7))
    inputs = [numbers(i, 1, h, layout.shares[rank], D).float().requires_grad_() for i, h in enumerate((8, 2, 2))]
    grads = []
    for settings in (None, HeadChunks(4)):
        with torch.autocast("cpu", torch.bfloat16):
            if settings is None:
                out = exchanged(batch, *inputs, meaning, mesh)
            else:
                out = exchanged_by_chunks(batch, *inputs, meaning, mesh, settings)
        grads.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    return [worst([(a.double(), b.double())]) for a, b in zip(*grads, strict=True)]


def test_mixed_precision_is_repeated(pool: ProcessPool) -> None:
    for found in pool.run(precision, 2, world_size=2):
        # Gradients of keys are rounded for each chunk before they are added.
        assert found[:2] == [0, 0] and max(found) <= 5e-3, found


def in_half(rank: int, size: int, narrow: bool) -> list[float]:
    """bfloat16 errors of the gradients of k and v: all heads at once, and in chunks that share one of them."""
    mesh, layout = join_world(rank, size), SequenceLayout(512, size)
    batch, meaning, span = LocalBatch(layout), Softmax(MaskSpec(True)), layout.spans[rank]
    whole = [numbers(i, 1, h, 512, 32).bfloat16().double().requires_grad_() for i, h in enumerate((32, 1, 1))]
    weights = numbers(5, 1, 32, 512, 32).bfloat16().double()
    exact = torch.autograd.grad((attend(*whole, MaskSpec(True)) * weights).sum(), whole)
    inputs = [t.detach()[:, :, span].bfloat16().requires_grad_() for t in whole]
    found = []
    copy = {"side_effect": lambda tensor: tensor.clone()} if narrow else {"wraps": held_heads._wide_copy}
    for count in (1, 16):
        with mock.patch.object(held_heads, "_wide_copy", **copy):
            if count == 1:
                out = exchanged(batch, *inputs, meaning, mesh)
            else:
                out = exchanged_by_chunks(batch, *inputs, meaning, mesh, HeadChunks(count))
            grads = torch.autograd.grad(out, inputs, weights[:, :, span].bfloat16())
        squares = torch.stack([(a.double() - b[:, :, span]).square().sum() for a, b in zip(grads, exact, strict=True)])
        dist.all_reduce(squares)
        found.append(float((squares[1] + squares[2]).sqrt()))
    return found


def test_sums_over_chunks_are_not_rounded(pool: ProcessPool) -> None:
    whole, parts = pool.run(in_half, 2, False, world_size=2)[0]
    assert parts <= whole
    # The negative control.
    assert pool.run(in_half, 2, True, world_size=2)[0][1] > 1.2 * parts


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

    def __init__(self, bias: Tensor) -> None:
        self.bias = bias

    def given(self, learned: Any) -> Hidden:
        return self

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: slice, kv_index: Any, mesh: SequenceMesh) -> Tensor:
        return attend(q, k, v, MaskSpec(False), kv_index=kv_index, bias=self.bias[:, heads])


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
    for heads, count, length in ((7, 4, 13), (2, 2, 13), (1, 1, 13), (7, 2, 5)):
        layout = SequenceLayout(13, size)
        q, k, v = (torch.zeros(1, heads, length, D)[:, :, layout.spans[rank]] for _ in range(3))
        with pytest.raises(UlyssesError) as raised:
            exchanged_by_chunks(LocalBatch(layout), q, k, v, Softmax(MaskSpec(True)), mesh, HeadChunks(count))
        words.append(str(raised.value))
    return words


def test_what_is_refused(pool: ProcessPool) -> None:
    for seven, two, one, short in pool.run(refused, 2, world_size=2):
        assert "head_chunks=4" in seven and "7 query heads" in seven and "set head_chunks=3" in seven
        assert "set head_chunks=1" in two and "sp_size=2" in one and "Got attention over" in short


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
