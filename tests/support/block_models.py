"""Models of repeated blocks for the tests of checkpoints."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WIDTH = 16


class Block(nn.Module):
    """A layer that draws random numbers of torch, NumPy and Python; it counts its calls."""

    def __init__(self, p: float = 0.0, is_drawn: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.dropout, self.is_drawn, self.calls = nn.Dropout(p), is_drawn, 0

    def forward(self, x: Tensor, scale: Tensor | None = None, seen: list[Tensor] | None = None) -> Tensor:
        self.calls += 1
        x = x + self.attention(x, x, x, need_weights=False)[0]
        if seen is not None:
            x = x + sum(seen)
            seen.append(x.mean(1, keepdim=True))
        factor = 1 + random.random() + float(np.random.rand()) if self.is_drawn else 1
        return x + self.dropout(self.mlp(factor * (x if scale is None else x * scale)))


class Stack(nn.Module):
    def __init__(
        self, call: Callable[[nn.Module, Tensor], Tensor] | None = None, layers: int = 3, **given: Any
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(**given) for _ in range(layers)])
        self.call = call or (lambda layer, x: layer(x))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.call(layer, x)
        return x


def data(tokens: int = 12) -> Tensor:
    return torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(1))


def step(root: nn.Module) -> Tensor:
    """One step from the same random numbers; the loss, and a draw after it."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    root.zero_grad()
    root(data()).square().mean().backward()
    return torch.tensor([float(torch.rand(())), random.random(), float(np.random.rand())])
