"""The public function for losses written by hand: against all logits, without a strategy."""

from __future__ import annotations

import copy
import sys
import types
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from memory_parts import Holder, relative, targets, tiled, worst
from torch import Tensor, nn

from lightning_ulysses import UlyssesError, tiled_cross_entropy
from lightning_ulysses.geometry.distance import largest
from lightning_ulysses.memory import cross_entropy

V, D = 57, 16


def reference(hidden: Tensor, head: nn.Module, labels: Tensor, **settings: Any) -> Tensor:
    logits = head(hidden) * settings.pop("scale", 1.0)
    cap = settings.pop("softcap", None)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    found = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **settings)
    return found.view(labels.shape) if found.dim() else found


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": 0.3},
    "both": {"scale": 2.0, "softcap": 3.0},
    "smoothing": {"label_smoothing": 0.1},
    "class weights": {"weight": torch.linspace(0.5, 2, V).double()},
    "another ignored label": {"ignore_index": 7},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none", "softcap": 3.0},
}
HEADS: dict[str, Any] = {
    "linear": lambda: nn.Linear(D, V),
    "two layers": lambda: nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, V)),
}


@pytest.mark.parametrize("shape", [(2, 13), (1, 1), (5,)])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradients(name: str, head: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    root = HEADS[head]().double()
    plain, settings = copy.deepcopy(root), SETTINGS[name]
    x, y = torch.randn(*shape, D, dtype=torch.float64), targets(shape, V, 0.3)
    y.view(-1)[0] = 3
    if "ignore_index" in settings:
        y.clamp_(min=0)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    wanted, found = reference(a, plain, y, **settings), tiled_cross_entropy(b, root, y, tile_tokens=4, **settings)
    assert found.shape == wanted.shape and relative(found.detach(), wanted.detach()) <= 1e-13
    factors = torch.linspace(1, 7, max(wanted.numel(), 1), dtype=torch.float64).view(wanted.shape)
    (wanted * factors).sum().backward()
    (found * factors).sum().backward()
    assert largest((relative(b.grad, a.grad), worst(root, plain))) <= 1e-13
    assert "forward" not in vars(root) and "_call_impl" not in vars(root)


@pytest.mark.parametrize("kind", ["a parameter", "not a leaf", "no gradient"])
def test_a_weight(kind: str) -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(V, D).double().requires_grad_(kind != "no gradient")
    plain = copy.deepcopy(embedding)
    x, y = torch.randn(2, 13, D, dtype=torch.float64), targets((2, 13), V)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    factor = 2 if kind == "not a leaf" else 1
    F.cross_entropy((a @ (factor * plain.weight).t()).flatten(0, 1), y.flatten()).backward()
    weight = 2 * embedding.weight if kind == "not a leaf" else embedding.weight
    tiled_cross_entropy(b, weight, y, tile_tokens=4).backward()
    assert largest((relative(b.grad, a.grad), relative(embedding.weight.grad, plain.weight.grad))) <= 1e-13


def test_a_tile_of_logits_at_a_time() -> None:
    head, sizes = nn.Linear(D, V), []
    plain = F.linear
    x, y = torch.randn(2, 50, D, requires_grad=True), targets((2, 50), V, 0.5)

    def linear(x: Tensor, *rest: Tensor) -> Tensor:
        sizes.append(x.shape[-2])
        return plain(x, *rest)

    with mock.patch.object(F, "linear", linear):
        tiled_cross_entropy(x, head, y, tile_bytes=8 * 4 * V).backward()
    # One row more tells the type of logits.
    assert sum(sizes) == int((y != -100).sum()) + 1 and max(sizes) == 8


def test_hooks_of_the_head_see_logits() -> None:
    head, seen = nn.Linear(D, V), list[torch.Size]()
    head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    tiled_cross_entropy(torch.randn(2, 13, D), head, targets((2, 13), V), tile_tokens=4).backward()
    assert seen == [(2, 13, V)]


def test_where_the_head_is_tiled_already() -> None:
    torch.manual_seed(0)
    root = Holder("head", nn.Linear(D, V))
    plain = copy.deepcopy(root)
    x, y = torch.randn(2, 13, D), targets((2, 13), V)
    reference(x, plain.head, y, softcap=3.0).backward()
    with tiled(root, tiled_loss=["head"], tile_tokens=4):
        tiled_cross_entropy(x, root.head, y, softcap=3.0).backward()
    assert worst(root, plain) <= 1e-6


def test_half_precision_and_evaluation() -> None:
    torch.manual_seed(0)
    head, x, y = nn.Linear(D, V).bfloat16(), torch.randn(2, 13, D).bfloat16(), targets((2, 13), V)
    wanted = F.cross_entropy(head(x).float().flatten(0, 1), y.flatten())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = tiled_cross_entropy(x, head, y, tile_tokens=4)
            assert found.dtype is torch.float32 and torch.allclose(found, wanted)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "logits and labels of other lengths": ({"labels": torch.zeros(2, 12).long()}, "one integer label for each"),
    "probabilities": ({"labels": torch.zeros(2, 13)}, "one integer label for each"),
    "a weight of another width": ({"head": torch.zeros(V, 9)}, rf"\(V, {D}\)"),
    "a weight that is elsewhere": ({"head": torch.zeros(0)}, "self.lm_head, whose call gathers it"),
    "a softcap of zero": ({"softcap": 0.0}, "positive softcap"),
    "dropout": ({"head": nn.Sequential(nn.Dropout(0.1), nn.Linear(D, V))}, "draws random numbers"),
    "liger on a CPU": ({"kernel": "liger"}, "kernel='liger' on cpu"),
    "tiles": ({"tile_tokens": 0}, "tile_tokens=0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    settings, message = REFUSED[name]
    given: dict[str, Any] = {
        "hidden": torch.randn(2, 13, D), "head": nn.Linear(D, V), "labels": targets((2, 13), V), **settings,
    }  # fmt: skip
    with pytest.raises(UlyssesError, match=message):
        tiled_cross_entropy(**given)


def stand_in(calls: list[dict[str, Any]]) -> Any:
    """A module with the function of liger-kernel, of the same signature, by torch."""

    def liger_fused_linear_cross_entropy(
        input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, ce_weight: Tensor | None = None,
        ignore_index: int = -100, lse_square_scale: float = 0.0, label_smoothing: float = 0.0, reduction: str = "mean",
        softcap: float | None = None, return_z_loss: bool = False, accum_dtype: Any = None,
        use_token_scaling: bool = False, return_token_accuracy: bool = False,
    ) -> Tensor:  # fmt: skip
        assert input.dim() == 2 and target.dim() == 1
        calls.append({"accum_dtype": accum_dtype, "softcap": softcap})
        logits = F.linear(input, weight, bias)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits, target, ce_weight, ignore_index=ignore_index, label_smoothing=label_smoothing,
                               reduction=reduction)  # fmt: skip

    functional = types.ModuleType("liger_kernel.transformers.functional")
    functional.liger_fused_linear_cross_entropy = liger_fused_linear_cross_entropy  # type: ignore[attr-defined]
    return functional


@pytest.mark.parametrize("name", ["plain", "softcap", "smoothing", "class weights", "another ignored label", "sum"])
def test_liger_gets_what_it_needs(name: str) -> None:
    torch.manual_seed(0)
    head, calls = nn.Linear(D, V).double(), list[dict[str, Any]]()
    plain = copy.deepcopy(head)
    x, y = torch.randn(2, 13, D, dtype=torch.float64), targets((2, 13), V).clamp(min=0)
    reference(x, plain, y, **SETTINGS[name]).backward()
    modules = {each: types.ModuleType(each) for each in ("liger_kernel", "liger_kernel.transformers")}
    modules["liger_kernel"].__spec__ = mock.Mock()
    modules["liger_kernel.transformers.functional"] = stand_in(calls)
    with mock.patch.dict(sys.modules, modules), mock.patch.object(cross_entropy, "_is_on_gpu", return_value=True):
        tiled_cross_entropy(x, head, y, kernel="liger", **SETTINGS[name]).backward()
        with pytest.raises(UlyssesError, match=r"kernel='liger' for a Sequential"):
            tiled_cross_entropy(x, nn.Sequential(head), y, kernel="liger")
    assert worst(head, plain) <= 1e-13
    assert calls == [{"accum_dtype": torch.float32, "softcap": SETTINGS[name].get("softcap")}]
