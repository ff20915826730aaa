"""Modules and helpers for the tests of parts that run tile by tile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ulysses.config import MemoryConfig
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.exchange.mesh import ALONE
from lightning_ulysses.geometry.distance import largest
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.memory import install


class Gated(nn.Module):
    """An MLP as in Llama; counts the rows that pass through it."""

    def __init__(self, width: int = 8, inner: int = 24) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width, bias=False)
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += x.numel() // x.shape[-1]
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Holder(nn.Module):
    """Holds one submodule under a name."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.name)(*args, **kwargs)


@contextmanager
def tiled(root: nn.Module, **settings: Any) -> Iterator[SequenceContext]:
    """Parts of ``root`` run tile by tile inside, as in a step of one process."""
    context = SequenceContext(ALONE)
    handle = install(context, root, MemoryConfig(**settings))
    try:
        with context.step(LocalBatch(SequenceLayout(8, 1))):
            yield context
    finally:
        handle.remove()


def relative(found: Tensor | None, wanted: Tensor | None) -> float:
    """The distance of two tensors over the norm of the second, in the 2-norm."""
    if found is None or wanted is None:
        return 0.0 if found is wanted else float("inf")
    distance = (found.double() - wanted.double()).norm()
    return float(distance / wanted.double().norm().clamp_min(1e-30))


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def worst(found: nn.Module, wanted: nn.Module) -> float:
    """The largest relative error of a gradient. One that is rounding alone counts as a thousandth of the largest."""
    mine, theirs = gradients(found), gradients(wanted)
    assert [name for name in mine if mine[name] is None] == [name for name in theirs if theirs[name] is None]
    both = [(a.double(), b.double()) for a, b in zip(mine.values(), theirs.values(), strict=True) if a is not None]
    longest = max((float(b.norm()) for _, b in both), default=0.0)
    errors = [float((a - b).norm()) / max(float(b.norm()), 1e-3 * longest, 1e-30) for a, b in both]
    # Where all is frozen there is no gradient to compare.
    return largest(errors) if errors else 0.0


def targets(shape: tuple[int, ...], classes: int, masked: float = 0.3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, classes, shape, generator=generator)
    drawn[torch.rand(shape, generator=generator) < masked] = -100
    return drawn
