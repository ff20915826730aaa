"""Losses of each token, whose mean over a sequence is that of all slices together."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_ulysses.divided.along import sum_of
from lightning_ulysses.divided.pointwise import align, on_slices
from lightning_ulysses.divided.tensor import Divided, rule


@lru_cache
def _signature(func: Any) -> inspect.Signature:
    return inspect.signature(func)


def _bound(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    bound = _signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    given = dict(bound.arguments)
    # Older spellings of ``reduction``.
    if given.pop("size_average", None) is not None or given.pop("reduce", None) is not None:
        return {}
    return given


def _reduced(each: Any, how: str, batch: int) -> Any:
    if how == "none" or each is NotImplemented:
        return each
    if how == "batchmean":
        return each.sum() / batch
    return each.mean() if how == "mean" else each.sum()


@rule(
    "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits",
    "kl_div", "poisson_nll_loss", "soft_margin_loss",
)  # fmt: skip
def _elementwise(func: Any, args: Any, kwargs: Any) -> Any:
    given = _bound(func, args, kwargs)
    if not given:
        return NotImplemented
    how, batch = given["reduction"], given["input"].shape[0]
    return _reduced(on_slices(func, (), {**given, "reduction": "none"}), how, batch)


@rule("cross_entropy", "nll_loss")
def _of_classes(func: Any, args: Any, kwargs: Any) -> Any:
    given = _bound(func, args, kwargs)
    x, y = given.get("input"), given.get("target")
    # Class scores lie along dimension 1, or 0 of a single token.
    if not isinstance(x, Divided) or x.dim() < 2 or x.division.dim == 1 or not isinstance(y, Tensor):
        return NotImplemented
    if y.is_floating_point():
        aligned = align((x, y), {})
        if aligned is NotImplemented:
            return NotImplemented
        (own_x, own_y), _ = aligned[0]
        division = x.division.at(max(x.division.dim - 1, 0))
    else:
        division = x.division.at(max(x.division.dim - 1, 0))
        own_x = x.local
        if isinstance(y, Divided):
            if y.division != division:
                return NotImplemented
            own_y = y.local
        elif y.dim() != x.dim() - 1 or y.shape[division.dim] != division.size:
            return NotImplemented
        else:
            own_y = division.cut(y, division.dim)
    how = given["reduction"]
    each = Divided(func(**{**given, "input": own_x, "target": own_y, "reduction": "none"}), division)
    if how != "mean":
        return _reduced(each, how, 1)
    if own_y.is_floating_point():
        return each.mean()
    keeps = own_y != given["ignore_index"]
    weight = given["weight"]
    counts = keeps.double() if weight is None else weight[own_y.clamp(0, len(weight) - 1)] * keeps
    # In half precision neither the count nor the sum would be exact.
    total = sum_of(counts.sum(dtype=torch.float64), division)
    precise = each.local.float() if each.dtype.itemsize < 4 else each.local
    return (sum_of(precise.sum(), division) / total.to(precise.dtype)).to(each.dtype)
