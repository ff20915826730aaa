"""Kernels under chunks of heads: they run once, and draw and round as all heads at once do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from chunk_steps import MASKS, D, join_world, numbers, step, worst
from gpu_paths import varlen_attention
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_ulysses.attention import MaskSpec, attend, held_heads
from lightning_ulysses.attention.attend import Softmax
from lightning_ulysses.attention.chunked import HeadChunks, exchanged_by_chunks
from lightning_ulysses.attention.explicit import Extras
from lightning_ulysses.attention.ulysses import exchanged
from lightning_ulysses.context import LocalBatch
from lightning_ulysses.geometry.distance import largest
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.testing.processes import ProcessPool

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
        assert len(errors) == 30 and largest(errors.values()) <= 1e-12, errors


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
        assert largest(found[::2]) <= 1e-12 and len(set(found[1::2])) == 4, found


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
        assert found[:2] == [0, 0] and largest(found) <= 5e-3, found


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
