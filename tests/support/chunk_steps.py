"""One attention call in chunks of heads, compared with attention on the whole sequence."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from gpu_paths import gpu_paths
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_ulysses.attention import MaskSpec, attend
from lightning_ulysses.attention.attend import Softmax
from lightning_ulysses.attention.chunked import HeadChunks, exchanged_by_chunks
from lightning_ulysses.attention.explicit import Extras
from lightning_ulysses.attention.ulysses import exchanged
from lightning_ulysses.context import LocalBatch
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.distance import largest
from lightning_ulysses.geometry.layout import SequenceLayout

D, D_V = 6, 4


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


def join_world(rank: int, size: int) -> SequenceMesh:
    dist.init_process_group("gloo", rank=rank, world_size=size)
    return SequenceMesh(rank, size, size, rank, 1, 0, sp_group=dist.group.WORLD)


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def worst(pairs: list[tuple[Tensor, Tensor]]) -> float:
    return largest(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)


def step(
    mesh: SequenceMesh,
    heads: tuple[int, int],
    chunks: HeadChunks | None,
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
    """The largest relative error of the output and of all gradients; without ``chunks`` of all heads at once."""
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
        if chunks is None:
            return exchanged(batch, q, k, v, meaning, mesh)
        return exchanged_by_chunks(batch, q, k, v, meaning, mesh, chunks)

    with gpu_paths() if on_gpu else nullcontext():
        out = checkpoint(call, *local, use_reentrant=False) if repeats else call(*local)
        found = [*torch.autograd.grad((out * weights[:, :, span]).sum(), [*local, *learned])]
    for grad in found[3:]:
        dist.all_reduce(grad)
    pairs = [(out.detach(), expected.detach()[:, :, span])]
    pairs += [(a, b[:, :, span]) for a, b in zip(found[:3], wanted[:3], strict=True)]
    return worst([*pairs, *zip(found[3:], wanted[3:], strict=True)])
