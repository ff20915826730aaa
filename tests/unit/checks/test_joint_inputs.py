"""Which inputs of a submodule are slices of those of one process, so that it may run joined."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ulysses.attention.whole_mask import is_stand_in
from lightning_ulysses.checks.trial.joints import JointFinder
from lightning_ulysses.checks.trial.outputs import ModuleOutputs, Slice
from lightning_ulysses.divided import Divided, Division
from lightning_ulysses.exchange.mesh import ALONE
from lightning_ulysses.geometry.joint import Joined

LENGTH, SHARE = 7, 4
CUT = Slice(slice(0, SHARE), LENGTH, 2)
# Without a group: whoever joins fails.
FIRST = replace(ALONE, world_size=2, sp_size=2)


class Reads(nn.Module):
    """Mixes the tokens of ``x``, beside a sequence that stays whole."""

    def forward(self, x: Tensor, memory: Tensor | None = None, **more: Any) -> Tensor:
        return x.cumsum(1).flip(1)


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Reads()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner(*args, **kwargs)


def noted(root: Root, *args: Any, **kwargs: Any) -> ModuleOutputs:
    found = ModuleOutputs()
    with found.watched(root):
        root(*args, **kwargs)
    return found


def joint(whole: ModuleOutputs, part: ModuleOutputs) -> Any:
    found = JointFinder(Root()).find(whole, part, CUT, ("inner", 0), 1e-3, {})
    return None if found is None else found.joint


@pytest.mark.parametrize("is_same", [True, False])
def test_a_divided_input_is_compared_by_its_slice(is_same: bool) -> None:
    root, x, memory = Root(), torch.randn(2, LENGTH, 3), torch.randn(2, LENGTH, 1, 3)
    own = memory[:, :SHARE] + (not is_same)
    divided = Divided(own, Division(1, ((0, SHARE, LENGTH),), FIRST))
    with pytest.raises(AssertionError):
        divided.whole()
    whole, part = noted(root, x, memory), noted(root, x[:, :SHARE], divided)
    # It stays whole: what reads it gets all of it. Where it is another one, the change lies before.
    assert joint(whole, part) == (Joined({"x": 1}, {"": 1}) if is_same else None)


def known_mask(length: int) -> Tensor:
    """One element in the shape of a mask, as `interceptors.transformers.masks` makes it."""
    return torch.ones(1, dtype=torch.bool).view(1, 1, 1, 1).expand(2, 1, length, length)


def test_what_stands_for_a_mask() -> None:
    assert is_stand_in(known_mask(SHARE)) and is_stand_in(known_mask(SHARE).detach())
    for other in (
        torch.ones(2, 1, SHARE, SHARE),
        torch.ones(1, 1, 1, 1),
        torch.ones(2, 1, 1, SHARE).expand(2, 3, 1, -1),
    ):
        assert not is_stand_in(other)


@pytest.mark.parametrize("mask", [None, torch.ones(2, 1, LENGTH, LENGTH).tril()], ids=["none", "of values"])
def test_a_known_mask_may_be_another_one_in_one_process(mask: Tensor | None) -> None:
    x = torch.randn(2, LENGTH, 3)
    whole, part = noted(Root(), x, mask), noted(Root(), x[:, :SHARE], known_mask(SHARE))
    assert joint(whole, part) == Joined({"x": 1}, {"": 1})
    # One that was made from the slice is not known.
    assert joint(whole, noted(Root(), x[:, :SHARE], torch.ones(2, 1, SHARE, SHARE).tril())) is None


def test_a_slice_may_get_more_and_not_less() -> None:
    x, labels = torch.randn(2, LENGTH, 3), torch.arange(LENGTH).expand(2, -1)
    whole, part = noted(Root(), x), noted(Root(), x[:, :SHARE], shift_labels=labels[:, 1 : SHARE + 1])
    assert joint(whole, part) == Joined({"x": 1}, {"": 1})
    assert joint(noted(Root(), x, labels=labels), noted(Root(), x[:, :SHARE])) is None
