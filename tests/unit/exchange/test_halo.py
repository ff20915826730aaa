"""Tokens beside a slice, and what their gradients add up to, against slices of the whole tensor in float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lightning_ulysses.exchange.halo import Fetch, fetched
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.testing.processes import ProcessPool


def errors(rank: int, size: int, seq_len: int, before: int, after: int, dim: int) -> list[float]:
    """Of the tokens, of their gradients, and of the gradients of a plain sum, which are one number expanded."""
    dist.init_process_group("gloo", rank=rank, world_size=size)
    group = dist.group.WORLD
    assert group is not None
    layout = SequenceLayout(seq_len, size)
    wanted = tuple((max(s.start - before, 0), min(s.stop + after, seq_len)) for s in layout.spans)
    shape = [2, 3, 4]
    shape[dim] = seq_len
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(shape, generator=generator, dtype=torch.float64)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(size)]
    span = layout.spans[rank]
    found = []
    for given in (weights, [torch.ones_like(whole)] * size):
        part = whole.narrow(dim, span.start, span.stop - span.start).clone().requires_grad_()
        out = fetched(part, dim, Fetch((*layout.starts, seq_len), wanted, rank, group))
        begin, end = wanted[rank]
        found.append(float((out - whole.narrow(dim, begin, end - begin)).abs().max()))
        is_plain = given is not weights
        (out.sum() if is_plain else (out * given[rank].narrow(dim, begin, end - begin)).sum()).backward()
        total = torch.zeros_like(whole)
        for (first, last), weight in zip(wanted, given, strict=True):
            total.narrow(dim, first, last - first).add_(weight.narrow(dim, first, last - first))
        assert part.grad is not None
        found.append(float((part.grad - total.narrow(dim, span.start, span.stop - span.start)).abs().max()))
    return found


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize(
    ("size", "seq_len", "before", "after"), [(2, 13, 3, 0), (3, 13, 2, 1), (4, 9, 7, 0), (4, 10, 5, 5), (3, 7, 0, 0)]
)
def test_tokens_and_gradients(pool: ProcessPool, size: int, seq_len: int, before: int, after: int, dim: int) -> None:
    for found in pool.run(errors, size, seq_len, before, after, dim, world_size=size):
        assert all(error <= 1e-12 for error in found), found
