"""Gradients of weights in half precision: 128 tiles against the same module without tiles."""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from memory_parts import Gated, Holder, relative, targets, tiled
from torch import Tensor, nn

from lightning_ulysses.memory import exact_sums, tiles

V, D, ROWS = 57, 16, 2048
Make = Callable[[], nn.Module]


class Conv(nn.Module):
    """The linear layer of GPT-2, whose weight has the inputs first."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        # (..., D) -> (n, D) -> (..., D_out)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class Twice(nn.Module):
    """Uses a weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x).tanh())


class Product(nn.Module):
    """A head that is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, V))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def adapted() -> nn.Module:
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(D, D), nn.Linear(D, V))
    return peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["1"], init_lora_weights=False), base)


HEADS: dict[str, Make] = {
    "linear": lambda: nn.Linear(D, V),
    "without a bias": lambda: nn.Linear(D, V, bias=False),
    "LoRA": adapted,
    "GPT-2": lambda: Conv(D, V),
    "frozen": lambda: nn.Linear(D, V).requires_grad_(False),
}
MLPS: dict[str, Make] = {
    "gated": lambda: Gated(D, 48),
    "GPT-2": lambda: nn.Sequential(Conv(D, 48), nn.GELU(), Conv(48, D)),
    "a weight used twice": Twice,
    "norm": lambda: nn.RMSNorm(D),
}


def step(root: nn.Module, x: Tensor, y: Tensor | None) -> None:
    if y is None:
        root(x).to(torch.promote_types(x.dtype, torch.float32)).square().mul(0.5).sum().backward()
    else:
        logits = root(x).view(-1, V)
        F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), y.view(-1), reduction="sum").backward()


def errors(make: Make, part: str, dtype: torch.dtype, size: int | None, mean: float = 0.0) -> list[float]:
    """The relative error of each gradient against float64; without tiles where ``size`` is None."""
    torch.manual_seed(0)
    exact = Holder("inner", make()).to(dtype).double()
    x = (torch.randn(2, ROWS // 2, D) + mean).to(dtype).double()
    y = targets((2, ROWS // 2), V, 0.0) if part == "tiled_loss" else None
    root = copy.deepcopy(exact).to(dtype)
    for each in (exact, root):
        each.zero_grad()
    own, wanted = x.to(dtype).requires_grad_(), x.clone().requires_grad_()
    step(exact, wanted, y)
    if size is None:
        step(root, own, y)
    else:
        with tiled(root, **{part: ["inner"], "tile_tokens": size}):
            step(root, own, y)
    pairs = [(own, wanted), *zip(root.parameters(), exact.parameters(), strict=True)]
    return [relative(a.grad, b.grad) for a, b in pairs if b.requires_grad]


@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("part", "name"), [("tiled_loss", name) for name in HEADS] + [("tiled_mlp", n) for n in MLPS])
def test_many_tiles_are_as_exact_as_one(part: str, name: str, dtype: torch.dtype, mean: float) -> None:
    make = (HEADS if part == "tiled_loss" else MLPS)[name]
    whole, parts = errors(make, part, dtype, None, mean), errors(make, part, dtype, ROWS // 128, mean)
    assert all(a <= 1.02 * b for a, b in zip(parts, whole, strict=True)), (parts, whole)


def test_other_heads_are_close() -> None:
    """What a tile gives is rounded before it is added."""
    whole, parts = (errors(Product, "tiled_loss", torch.bfloat16, size) for size in (None, ROWS // 128))
    assert all(a <= 1.4 * b for a, b in zip(parts, whole, strict=True)), (parts, whole)


@pytest.mark.parametrize(
    ("where", "what", "replacement", "least"),
    [(exact_sums, "_read", lambda *given: None, 1.15), (tiles, "precise", lambda dtype: dtype, 2)],
)
def test_rounding_is_seen(where: object, what: str, replacement: Callable[..., object], least: float) -> None:
    """The controls: what tiles give is rounded, or their sum."""
    whole = errors(HEADS["without a bias"], "tiled_loss", torch.bfloat16, None)
    with mock.patch.object(exact_sums, "_read", return_value=None), mock.patch.object(where, what, replacement):
        parts = errors(HEADS["without a bias"], "tiled_loss", torch.bfloat16, ROWS // 128)
    assert parts[1] > least * whole[1]


def test_mixed_precision_is_no_less_exact() -> None:
    torch.manual_seed(0)
    exact = Holder("mlp", Gated(D, 48)).double()
    x = torch.randn(1, ROWS, D).double()
    step(exact, x, None)
    found = []
    for size in (ROWS, ROWS // 128):
        root = copy.deepcopy(exact).float()
        root.zero_grad()
        with tiled(root, tiled_mlp=True, tile_tokens=size), torch.autocast("cpu", torch.bfloat16):
            loss = root(x.float()).float().square().mul(0.5).sum()
        loss.backward()
        found.append([relative(a.grad, b.grad) for a, b in zip(root.parameters(), exact.parameters(), strict=True)])
    assert all(a <= 1.02 * b for a, b in zip(found[1], found[0], strict=True)), found
