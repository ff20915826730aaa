"""Deferred logits are computed later than those of a head; what changes in between must not change them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from memory_parts import Gated, Holder, relative, targets, tiled, worst
from torch import Tensor, nn

from lightning_ulysses import UlyssesError
from lightning_ulysses.geometry.distance import largest

V, D = 57, 16
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.inner = nn.Dropout(0.5), nn.Linear(D, V)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.drop(x))


def mean(logits: Tensor, y: Tensor, **settings: Any) -> Tensor:
    return F.cross_entropy(logits.view(-1, V), y.view(-1), **settings)


def without_gradients(h: nn.Module, x: Tensor) -> Tensor:
    """As a teacher of the head's own."""
    h.eval()
    with torch.no_grad():
        logits = h(x)
    assert not logits.requires_grad
    h.train()
    return logits


def distilled(h: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    teacher = without_gradients(h, x)
    return F.kl_div(h(x * 2).log_softmax(-1), teacher.softmax(-1), reduction="sum")


def a_loss_without_gradients(h: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return mean(h(x), y) + mean(without_gradients(h, x), y)


def a_view_without_gradients(h: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    logits = h(x)
    with torch.no_grad():
        rows, scaled = logits[0], logits * 2
        entropy = rows.softmax(-1).mean()
    assert not scaled.requires_grad
    return mean(logits, y) + F.cross_entropy(rows, y[0]) + mean(scaled, y) + scaled.logsumexp(-1).mean() + entropy


def views_of_both_kinds(h: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    logits = h(x)
    rows = logits.view(-1, V)
    with torch.no_grad():
        first = rows[:5]
    return first.logsumexp(-1).mean() + rows.logsumexp(-1).mean() + first.exp().mean() + logits.exp().mean()


def a_write_without_gradients(h: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    logits = h(x)
    with torch.no_grad():
        logits.view(-1, V)[:, 0] = -3.0
    return mean(logits, y)


def another_mode(h: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    h.eval()
    logits = h(x)
    h.train()
    return mean(logits, y) + logits.logsumexp(-1).mean()


def a_backward_in_another_mode(h: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    h.eval()
    loss = mean(h(x), y)
    h.train()
    return loss


LOSSES: dict[str, tuple[Loss, type[nn.Module]]] = {
    "distilled": (distilled, nn.Linear),
    "a loss without gradients": (a_loss_without_gradients, nn.Linear),
    "a view without gradients": (a_view_without_gradients, nn.Linear),
    "views of both kinds": (views_of_both_kinds, nn.Linear),
    "a write without gradients": (a_write_without_gradients, nn.Linear),
    "another mode": (another_mode, Dropped),
    "a backward in another mode": (a_backward_in_another_mode, Dropped),
}


def head(kind: type[nn.Module]) -> Holder:
    torch.manual_seed(0)
    return Holder("head", nn.Linear(D, V) if kind is nn.Linear else kind()).double()


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 13, D, dtype=torch.float64, generator=generator), targets((2, 13), V)


@pytest.mark.filterwarnings("ignore:tiled_loss")
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    loss, kind = LOSSES[name]
    root, (x, y) = head(kind), inputs()
    plain = copy.deepcopy(root)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    wanted = loss(plain, a, y)
    wanted.backward()
    with tiled(root, tiled_loss=["head"], tile_tokens=4):
        found = loss(root, b, y)
        found.backward()
    assert largest((relative(found, wanted), relative(b.grad, a.grad), worst(root, plain))) <= 1e-13
    assert root.head.training


def written_labels(h: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    losses = mean(h(x), y, reduction="none")
    y.fill_(3)
    return losses.mean()


def written_weights(h: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    weight = torch.ones(V, dtype=x.dtype)
    losses = mean(h(x), y, weight=weight, reduction="none")
    weight[3] = 7
    return losses.sum()


def written_hidden_states(h: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    hidden = x * 2
    logits = h(hidden)
    hidden.add_(1)
    return mean(logits, y)


def hidden_states_after_a_copy(h: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    hidden = x * 2
    rows = h(hidden)[:, torch.tensor([1, 2])]
    hidden.add_(1)
    return rows.logsumexp(-1).mean()


def test_labels_may_change_after_a_mean() -> None:
    """Its gradients were made before."""
    root, (x, y) = head(nn.Linear), inputs()
    plain, labels = copy.deepcopy(root), y.clone()
    mean(plain(x), labels).backward()
    with tiled(root, tiled_loss=["head"], tile_tokens=4):
        loss = mean(root(x), y)
        y.fill_(3)
        loss.backward()
    assert worst(root, plain) <= 1e-13


WRITTEN = [written_labels, written_weights, written_hidden_states, hidden_states_after_a_copy]


@pytest.mark.filterwarnings("ignore:tiled_loss")
@pytest.mark.parametrize("loss", WRITTEN)
def test_writes_in_between_are_refused(loss: Loss) -> None:
    root, (x, y) = head(nn.Linear), inputs()
    with tiled(root, tiled_loss=["head"], tile_tokens=4), pytest.raises(UlyssesError, match="was written to before"):
        loss(root, x.requires_grad_(), y).backward()


def test_mixed_precision_of_the_head_alone() -> None:
    root = head(nn.Linear).float()
    plain = copy.deepcopy(root)
    (x, y), losses = inputs(), []
    for each in (plain, root):
        with tiled(each, **({"tiled_loss": ["head"], "tile_tokens": 4} if each is root else {})):
            with torch.autocast("cpu", torch.bfloat16):
                logits = each(x.float())
            loss = mean(logits.float(), y)
            loss.backward()
        assert logits.dtype is torch.bfloat16
        losses.append(float(loss))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert worst(root, plain) <= 2e-2


def test_a_module_whose_mode_changes_before_the_backward() -> None:
    torch.manual_seed(0)
    root = Holder("mlp", nn.Sequential(Gated(), nn.Dropout(0.5))).double()
    plain = copy.deepcopy(root)
    x = torch.randn(1, 13, 8, dtype=torch.float64)
    for each in (plain, root):
        with tiled(each, **({"tiled_mlp": ["mlp"], "tile_tokens": 4} if each is root else {})):
            each.eval()
            output = each(x)
            each.train()
            output.square().sum().backward()
    assert worst(root, plain) <= 1e-13
