"""Memory of an attention call on one of P ranks, beside DeepSpeed's ``UlyssesSPAttentionHF``, on a GPU's paths.

A fake process group stands for the other ranks: what is received is not what they would send, but as much.
"""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from gpu_paths import gpu_paths
from memory import MemoryCount
from torch import Tensor, nn

from lightning_ulysses.attention import MaskSpec
from lightning_ulysses.attention.attend import Softmax
from lightning_ulysses.attention.ulysses import exchanged
from lightning_ulysses.context import LocalBatch
from lightning_ulysses.exchange import all_to_all
from lightning_ulysses.exchange.all_to_all import heads_to_seq, seq_to_heads
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.heads import head_layout
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.testing.processes import ProcessPool
from lightning_ulysses.upstream.deepspeed import forget_world, without_shared_memory_op

D = 32


class FlashMemory(torch.autograd.Function):
    """What CUDA's flash kernel allocates and keeps, without its arithmetic.

    Outputs and gradients have the order in memory of what they belong to (torch ``transformers/cuda/attention.cu``).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = torch.zeros_like(q), q.new_zeros(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(t) for t in ctx.saved_tensors[:3])


def flash(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    out: Tensor = FlashMemory.apply(q, k, v)
    return out


def join_fake_world(size: int) -> SequenceMesh:
    """A middle rank of a group whose other ranks are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    rank = size // 2
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    return SequenceMesh(rank, size, size, rank, 1, 0, sp_group=dist.group.WORLD)


def ours(mesh: SequenceMesh, seq_len: int, heads: int, kv_heads: int, rows: int) -> Any:
    batch, meaning = LocalBatch(SequenceLayout(seq_len, mesh.sp_size), rows=rows), Softmax(MaskSpec(causal=True))
    return lambda q, k, v: exchanged(batch, q, k, v, meaning, mesh).transpose(1, 2).contiguous()


def theirs(mesh: SequenceMesh, seq_len: int, heads: int, kv_heads: int, rows: int) -> Any:
    import deepspeed.comm
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    with without_shared_memory_op():
        deepspeed.comm.init_distributed("gloo", verbose=False)
    block: Any = nn.Module()

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        # As transformers' `sdpa_attention_forward` on a GPU without a mask.
        return flash(q, k, v).transpose(1, 2).contiguous(), None

    layer = UlyssesSPAttentionHF(
        attn=attention,
        batch_size=rows,
        attn_head_count=heads,
        attn_head_size=D,
        kv_head_count=kv_heads,
        num_hidden_layers=1,
        process_group=mesh.sp_group,
        seq_length_is_variable=True,
    )
    positions = torch.arange(seq_len // mesh.sp_size).expand(rows, -1)
    return lambda q, k, v: layer(block, q, k, v, None, position_ids=positions)[0].unflatten(2, (heads, D))


def measure(
    rank: int, side: str, sp_size: int, heads: int, kv_heads: int, rows: int, bulky: int = 2**10
) -> list[float]:
    """Peak of the forward, bytes that it leaves, and peak of the backward, in units of this rank's q."""
    mesh, seq_len = join_fake_world(sp_size), 1024
    share = seq_len // sp_size
    try:
        # As a Llama block hands them over: (B, S_r, heads, D) in memory.
        leaves = [
            torch.randn(rows, share, h, D, dtype=torch.bfloat16).transpose(1, 2) for h in (heads, kv_heads, kv_heads)
        ]
        grad = torch.randn(rows, share, heads, D, dtype=torch.bfloat16)
        call = {"ours": ours, "theirs": theirs}[side](mesh, seq_len, heads, kv_heads, rows)
        tensors = [t.requires_grad_() for t in leaves]
        # Sizes of a real run, where the gradients are sent one by one.
        with (
            gpu_paths(),
            mock.patch("lightning_ulysses.attention.kernel._sdpa", flash),
            mock.patch.object(all_to_all, "_BULKY", bulky),
        ):
            call(*tensors)
            with MemoryCount() as memory:
                out = call(*tensors)
                forward, left = memory.peak, memory.now
                memory.hold(grad)
                memory.restart()
                grads = torch.autograd.grad(out, tensors, grad)
                del grads
        unit = tensors[0].numel() * 2
        return [forward / unit, left / unit, memory.peak / unit]
    finally:
        dist.destroy_process_group()
        forget_world()


ROWS = [(8, 32, 32, 1), (8, 32, 8, 1), (8, 32, 8, 2), (2, 32, 8, 1)]


@pytest.mark.parametrize(("sp_size", "heads", "kv_heads", "rows"), ROWS)
def test_peaks_are_at_most_those_of_deepspeed(
    pool: ProcessPool, sp_size: int, heads: int, kv_heads: int, rows: int
) -> None:
    sizes = (sp_size, heads, kv_heads, rows)
    mine, other = (pool.run(measure, side, *sizes, world_size=1)[0] for side in ("ours", "theirs"))
    assert all(a <= b + 0.01 for a, b in zip(mine, other, strict=True)), (mine, other)


def test_one_exchange_of_all_gradients_would_take_more(pool: ProcessPool) -> None:
    apart, together = (pool.run(measure, "ours", *ROWS[0], bulky, world_size=1)[0] for bulky in (2**10, 2**60))
    assert together[:2] == apart[:2] and together[2] > apart[2] + 0.5


def operations(rank: int, sp_size: int, heads: int, kv_heads: int) -> tuple[int, float]:
    """Dispatched operations of both exchanges with their backward, and the processor time of a repetition."""
    mesh, share = join_fake_world(sp_size), 2
    assert mesh.sp_group is not None
    try:
        q, k, v = (torch.randn(1, h, share, 8, requires_grad=True) for h in (heads, kv_heads, kv_heads))

        def both() -> None:
            where = head_layout(heads, kv_heads, sp_size), (share,) * sp_size, mesh.sp_rank, mesh.sp_group
            out = seq_to_heads(q, k, v, *where)  # type: ignore[arg-type]
            back = heads_to_seq(out[0], *where)  # type: ignore[arg-type]
            torch.autograd.grad(back.sum() + out[1].sum() + out[2].sum(), [q, k, v])

        both()
        with MemoryCount() as count:
            both()
        begin = time.process_time()
        for _ in range(20):
            both()
        return count.operations, (time.process_time() - begin) / 20
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("heads", "kv_heads"), [(64, 64), (64, 8), (64, 1)])
def test_operations_grow_with_the_ranks_and_not_with_their_square(pool: ProcessPool, heads: int, kv_heads: int) -> None:
    few, many = (pool.run(operations, size, heads, kv_heads, world_size=1)[0][0] for size in (8, 64))
    # Only key/value heads that many ranks share are added one by one.
    assert few <= 230 and (many - few) / 56 <= 5
