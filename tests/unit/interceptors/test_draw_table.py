"""Which dimension of a draw is cut, in one process that stands for each rank in turn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.interceptors import torch_draws

P, B, S, W = 3, 2, 11, 7


def mesh(rank: int) -> SequenceMesh:
    return SequenceMesh(rank, world_size=P, sp_size=P, sp_rank=rank, dp_size=1, dp_rank=0)


@pytest.fixture
def context() -> Iterator[SequenceContext]:
    context = SequenceContext(mesh(0))
    handle = torch_draws.install(context, {})
    yield context
    handle.remove()
    assert "uniform_" not in vars(Tensor) and not hasattr(torch.rand, "__wrapped__")


def drawn(context: SequenceContext, draw: Callable[[int], Tensor], layout: SequenceLayout, rank: int) -> Tensor:
    context.mesh = mesh(rank)
    torch.manual_seed(0)
    with context.step(LocalBatch(layout, rows=B)):
        own = draw(layout.shares[rank])
        # Whatever is drawn next is the same on all ranks.
        return torch.cat([own.flatten(), torch.rand(2)])


SHAPES: dict[str, tuple[Callable[[int], Tensor], int]] = {
    "rand": (lambda n: torch.rand(B, n, W), 1),
    "rand of a tuple": (lambda n: torch.rand((B, n), dtype=torch.float64), 1),
    "randn by keyword": (lambda n: torch.randn(size=(B, 6, n)), 2),
    "randint": (lambda n: torch.randint(3, 9, (B, n)), 1),
    "normal": (lambda n: torch.normal(0.0, 1.0, (n, B, W)), 0),
    "normal of tensors": (lambda n: torch.normal(torch.ones(B, n, W), torch.ones(W)), 1),
    "exponential": (lambda n: torch.empty(B, n, W).exponential_(), 1),
    "transposed": (lambda n: torch.empty(B, W, n).transpose(1, 2).normal_(), 1),
    "probabilities": (lambda n: torch.zeros(B, n, W).bernoulli_(torch.full((B, n, W), 0.5)), 1),
    "bernoulli": (lambda n: torch.full((B, n), 0.5).bernoulli(), 1),
    "dropout": (lambda n: F.dropout(torch.ones(B, n, W), 0.5, inplace=True), 1),
    "torch.dropout": (lambda n: torch.dropout(torch.ones(B, n, W), 0.5, train=True), 1),
    "channels": (lambda n: F.dropout1d(torch.ones(B, W, n), 0.5), 2),
    "alpha": (lambda n: F.alpha_dropout(torch.ones(B, n, W), 0.5, True), 1),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("padding", [0, 2])
def test_slices_are_those_of_one_draw(context: SequenceContext, name: str, padding: int) -> None:
    draw, dim = SHAPES[name]
    torch.manual_seed(0)
    whole, following = draw(S), torch.rand(2)
    layout = SequenceLayout(S + padding, P, num_padding=padding)
    for rank in range(P):
        found = drawn(context, draw, layout, rank)
        assert torch.equal(found[-2:], following.to(found.dtype))
        share = layout.shares[rank]
        own = found[:-2].view(*whole.shape[:dim], share, *whole.shape[dim + 1 :])
        wanted = whole.narrow(dim, layout.starts[rank], min(share, S - layout.starts[rank]))
        assert torch.equal(own.narrow(dim, 0, wanted.shape[dim]), wanted.to(own.dtype))


def test_rows_and_tokens_in_one_dimension(context: SequenceContext) -> None:
    torch.manual_seed(0)
    # (B * S, W) -> (B, S, W)
    whole = torch.randn(B * S, W).view(B, S, W)
    layout = SequenceLayout(S, P)
    for rank in range(P):
        found = drawn(context, lambda n: torch.randn(B * n, W), layout, rank)[:-2]
        assert torch.equal(found.view(B, -1, W), whole[:, layout.spans[rank]])


def test_gradients_see_the_same_mask(context: SequenceContext) -> None:
    layout = SequenceLayout(S, P)
    x = torch.ones(B, layout.shares[0], W, requires_grad=True)
    with context.step(LocalBatch(layout, rows=B)):
        y: Any = F.dropout(x, 0.5)
    y.sum().backward()
    assert torch.equal(x.grad, y) and 0 < int((y == 0).sum()) < y.numel()


def test_what_has_no_tokens_is_the_groups(context: SequenceContext) -> None:
    layout = SequenceLayout(S, P)
    found = [drawn(context, lambda n: torch.rand(B, W + 2), layout, rank) for rank in range(P)]
    assert all(torch.equal(each, found[0]) for each in found)


def test_an_ambiguous_shape_is_named_once(context: SequenceContext) -> None:
    layout = SequenceLayout(S, P)
    with pytest.warns(UserWarning, match=r"rand at .*test_draw_table.py:\d+ draws \(2, 4, 4\).*Dimension 1 is taken"):
        drawn(context, lambda n: torch.rand(B, n, 4), layout, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn(context, lambda n: torch.rand(B, n, 6), layout, 0)
