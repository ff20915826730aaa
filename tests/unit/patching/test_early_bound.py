"""Attention functions that were imported by name or stored before the strategy existed."""

from __future__ import annotations

import functools
import sys
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Block, HandWritten, count_targets, pair_batch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as by_name

from lightning_ulysses.patching.early_bound import rebind
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.testing import SplitRun, compare, fit_rank, fit_single
from lightning_ulysses.testing.processes import ProcessPool


class OnClass(nn.Module):
    attend = staticmethod(by_name)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v, is_causal=True)


class OnInstance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = by_name

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v, is_causal=True)


class Partial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = functools.partial(by_name, is_causal=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v)


class ByName(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return by_name(q, k, v, is_causal=True)


KINDS = {"class": OnClass, "instance": OnInstance, "partial": Partial, "name": ByName}


class Early(HandWritten):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.attention = KINDS[kind]()
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attend = self.attention.forward  # type: ignore[method-assign]


def fit(rank: int, kind: str) -> Any:
    made: list[Early] = []

    def make() -> Early:
        made.append(Early(kind))
        return made[0]

    result = fit_rank(rank, make, [pair_batch(1, 33)], SplitRun())
    # Everything is back in place.
    attend = getattr(made[0].attention, "attend", None)
    assert by_name is F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
    assert kind == "name" or attend is by_name or attend.func is by_name
    assert kind != "class" or isinstance(vars(OnClass)["attend"], staticmethod)
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_one_step(pool: ProcessPool, kind: str) -> None:
    reference = fit_single(partial(Early, kind), [[pair_batch(1, 33)]], count_targets)
    for result in pool.run(fit, kind, world_size=2):
        assert compare(result, reference).largest <= 1e-5


def test_looking_for_them_is_undone() -> None:
    root, handle = nn.ModuleList([OnInstance() for _ in range(5)]), Handle()
    rebind(handle, root, {by_name: max})
    assert all(module.attend is max for module in root) and by_name is max
    handle.remove()
    assert all(module.attend is F.scaled_dot_product_attention for module in root)
    assert by_name is F.scaled_dot_product_attention


class Proxy:
    """Stands for something that cannot be had yet, as lazy modules and the context variables of web frameworks do."""

    @property
    def __class__(self) -> Any:
        raise RuntimeError("nothing to stand for yet")


def test_proxies_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside a partial application, for which a module is looked at more closely."""
    lazy = ModuleType("lazy")
    lazy.proxy, lazy.attend = Proxy(), partial(by_name, scale=0.5)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lazy", lazy)
    handle = Handle()
    rebind(handle, nn.Module(), {by_name: max})
    assert lazy.attend.func is max
    handle.remove()
    assert lazy.attend.func is F.scaled_dot_product_attention
