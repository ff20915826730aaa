"""Bytes that one rank holds and sends for an attention call, in chunks of heads and all at once, on a GPU's paths.

A fake process group stands for the other ranks: what is received is not what they would send, but as much.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from gpu_paths import gpu_paths
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lightning_ulysses.attention import MaskSpec
from lightning_ulysses.attention.attend import Softmax
from lightning_ulysses.attention.chunked import HeadChunks, exchanged_by_chunks
from lightning_ulysses.attention.chunked_call import ChunkedCall
from lightning_ulysses.attention.ulysses import exchanged
from lightning_ulysses.context import LocalBatch
from lightning_ulysses.exchange import all_to_all
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.exchange.some_heads import Wire
from lightning_ulysses.geometry.head_chunks import head_chunks
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.testing.processes import ProcessPool
from lightning_ulysses.upstream.deepspeed import forget_world

P, S, D = 8, 1024, 128
FLASH, BACKWARD = "ulysses_tests::flash_attention", "ulysses_tests::flash_attention_backward"


def define_flash() -> Any:
    """An operator that allocates and keeps what CUDA's flash kernel does, without its arithmetic."""

    @torch.library.custom_op(FLASH, mutates_args=())
    def flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(q), q.new_zeros(q.shape[:3], dtype=torch.float32)

    @torch.library.custom_op(BACKWARD, mutates_args=())
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs, *output)

    flash.register_autograd(lambda ctx, grad, _: backward(grad, *ctx.saved_tensors), setup_context=keep)
    return flash


def workspace(q: Tensor, k: Tensor) -> int:
    """Bytes that the backward of flash-attn 2 takes for itself (``csrc/flash_attn/flash_api.cpp``).

    The gradient of q in float32, and with fewer key/value heads those of k and v for each query head.
    """
    return q.numel() * 4 + (2 * q.numel() * q.element_size() if k.shape[1] < q.shape[1] else 0)


class Held(TorchDispatchMode):
    """A log of all bytes that are taken and given back, by tensor; see `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[int, int]] = []
        self._numbers: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage not in self._numbers:
            number, size = len(self.log), storage.nbytes()
            self._numbers[storage] = number
            self.log.append((number, size))
            weakref.finalize(storage, self.log.append, (number, -size))
        return self._numbers[storage]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(answer):
            if isinstance(leaf, Tensor):
                self.number(leaf)
        if func.name() == BACKWARD:
            size = workspace(args[1], args[2])
            self.log += [(-1, size), (-1, -size)]
        return answer

    def peak(self, without: set[int], begin: int = 0, end: int | None = None) -> int:
        """The most bytes at a time in a part of the log."""
        now = most = 0
        for place, (number, size) in enumerate(self.log[:end]):
            now += 0 if number in without else size
            most = max(most, now) if place >= begin else most
        return most


@dataclass
class Cost:
    """Of one call, in units of this rank's q: the most in the forward and the backward, kept between, and sent in each.

    Without what has the shape of this rank's q, k or v: these themselves, the output, and the gradients of all four.
    """

    forward: float
    kept: float
    backward: float
    sent: tuple[float, float]
    collectives: int


@contextmanager
def one_of_many() -> Iterator[SequenceMesh]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=P // 2, world_size=P)
    flash = define_flash()

    def sdpa(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        out: Tensor = flash(q, k, v)[0]
        return out

    try:
        with (
            gpu_paths(),
            mock.patch("lightning_ulysses.attention.kernel._sdpa", sdpa),
            # Sizes of a real run, where the gradients are sent one by one.
            mock.patch.object(all_to_all, "_BULKY", 2**10),
        ):
            yield SequenceMesh(P // 2, P, P, P // 2, 1, 0, sp_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
        forget_world()


@contextmanager
def counting(sent: list[int]) -> Iterator[None]:
    """Adds the elements of each all-to-all that go to other ranks, or would in a group of which no rank is first."""
    original = dist.all_to_all_single

    def send(recv: Tensor, tensor: Tensor, recv_sizes: Any, send_sizes: list[int], **settings: Any) -> Any:
        sent.append(sum(size for peer, size in enumerate(send_sizes) if peer != P // 2))
        return original(recv, tensor, recv_sizes, send_sizes, **settings)

    with mock.patch.object(dist, "all_to_all_single", send):
        yield


def tensors(heads: int, kv_heads: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, each (B, heads, S_r, D) and by token in memory."""
    shapes = [(1, S // P, h, D) for h in (heads, kv_heads, kv_heads, heads)]
    each = [torch.randn(shape, dtype=torch.bfloat16).transpose(1, 2) for shape in shapes]
    return [tensor.requires_grad_(number < 3) for number, tensor in enumerate(each)]


def measure(rank: int, heads: int, kv_heads: int, count: int, overlaps: bool = False, repeats: bool = False) -> Cost:
    with one_of_many() as mesh:
        *inputs, grad = tensors(heads, kv_heads)
        batch, meaning, chunks = LocalBatch(SequenceLayout(S, P)), Softmax(MaskSpec(True)), HeadChunks(count, overlaps)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if count == 1:
                return exchanged(batch, q, k, v, meaning, mesh)
            return exchanged_by_chunks(batch, q, k, v, meaning, mesh, chunks)

        def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # What follows needs the output for its backward, as a projection would.
            return call(q, k, v).sin()

        sent: list[int] = []
        with Held() as held, counting(sent):
            mine = {held.number(tensor) for tensor in (*inputs, grad)}
            out = checkpoint(block, *inputs, use_reentrant=False) if repeats else call(*inputs)
            mine.add(held.number(out))
            place, first = len(held.log), len(sent)
            grads = torch.autograd.grad(out, inputs, grad)
            mine |= {held.number(tensor) for tensor in grads}
        unit = inputs[0].numel()
        forward, kept = held.peak(mine, 0, place), sum(size for number, size in held.log[:place] if number not in mine)
        volumes = (sum(sent[:first]) / unit, sum(sent[first:]) / unit)
        return Cost(forward / unit / 2, kept / unit / 2, held.peak(mine, place) / unit / 2, volumes, len(sent))


# H, H_kv, chunks; the most of what all heads at once take, in the forward and in forward and backward together.
MODELS = {
    "8B": (32, 8, 4, 0.30, 0.40),
    "32B": (64, 8, 8, 0.17, 0.22),
    "no groups": (32, 32, 4, 0.18, 0.26),
}


def both(pool: ProcessPool, heads: int, kv_heads: int, count: int, repeats: bool = False) -> tuple[Cost, Cost]:
    """All heads at once, and in chunks."""
    whole, parts = (
        pool.run(measure, heads, kv_heads, number, False, repeats, world_size=1)[0] for number in (1, count)
    )
    return whole, parts


@pytest.mark.parametrize("model", MODELS)
def test_one_chunk_is_alive_at_a_time(pool: ProcessPool, model: str) -> None:
    heads, kv_heads, count, in_forward, in_step = MODELS[model]
    whole, parts = both(pool, heads, kv_heads, count)
    for name, cost in (("at once", whole), ("in chunks", parts)):
        print(f"{model} {name}: forward {cost.forward:.2f}, kept {cost.kept:.2f}, backward {cost.backward:.2f}")
    assert parts.forward <= in_forward * whole.forward
    assert max(parts.forward, parts.backward) <= in_step * max(whole.forward, whole.backward)
    # The log-sum-exp alone is kept.
    assert parts.kept <= 0.1 < 2 < whole.kept


def test_overlap_takes_a_second_chunk(pool: ProcessPool) -> None:
    """Its tensors, and what it sends, but not more."""
    heads, kv_heads, count, *_ = MODELS["32B"]
    apart, beside = (pool.run(measure, heads, kv_heads, count, o, world_size=1)[0] for o in (False, True))
    assert beside.sent == apart.sent and beside.collectives == apart.collectives
    # Queries, output and its gradient, each as it is sent and as it is received.
    assert apart.backward < beside.backward <= apart.backward + 6 / count + 0.01


@pytest.mark.parametrize("model", MODELS)
def test_volume(pool: ProcessPool, model: str) -> None:
    """The forward sends what it sends for all heads at once. The backward exchanges inputs and output again."""
    heads, kv_heads, count, *_ = MODELS[model]
    whole, parts = both(pool, heads, kv_heads, count)
    assert parts.sent[0] == whole.sent[0] == whole.sent[1]
    assert parts.sent[1] == 2 * whole.sent[1]


def kept_volume(rank: int, heads: int, kv_heads: int, count: int) -> float:
    """What a call sends if its output is kept over a checkpoint: nothing, where the block is computed again."""
    with one_of_many() as mesh:
        *inputs, grad = tensors(heads, kv_heads)
        assert mesh.sp_group is not None
        sent: list[int] = []
        wire = Wire(SequenceLayout(S, P).shares, mesh.sp_rank, mesh.sp_group)
        call = ChunkedCall(head_chunks(heads, kv_heads, P, count), wire, Softmax(MaskSpec(True)), mesh)
        with torch.no_grad(), counting(sent):
            out, kept = call.first(inputs, keeps=True)
            call.gradients(inputs, out, kept, grad)
        return sum(sent) / inputs[0].numel()


@pytest.mark.parametrize("model", MODELS)
def test_volume_under_a_checkpoint(pool: ProcessPool, model: str) -> None:
    """With outputs that are kept it is that of a checkpoint without chunks. Otherwise one more exchange each way."""
    heads, kv_heads, count, *_ = MODELS[model]
    whole, parts = both(pool, heads, kv_heads, count, repeats=True)
    kept = pool.run(kept_volume, heads, kv_heads, count, world_size=1)[0]
    assert sum(whole.sent) == kept
    assert sum(parts.sent) == pytest.approx(kept * 4 / 3)
