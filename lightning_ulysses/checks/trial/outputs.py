"""Compares what modules return on an excerpt with what they return on a slice of it.

Attention answers alike in both runs, so that each module that keeps tokens apart returns its slice. The first module
that does not mixes tokens, or takes positions from the length of what it gets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from lightning_ulysses.context import LocalBatch

# A call: the name of the module, and how often it was called before.
_Call = tuple[str, int]


@dataclass(frozen=True)
class Change:
    """What differs between two runs.

    Attributes:
        where: What it is, such as ``"what 'conv' (Conv1d) returns"``.
        distance: By how much, relative to the size of a token.
        is_result: Whether it is what the step itself returns, and not anything inside.
    """

    where: str
    distance: float
    is_result: bool = False


@dataclass(frozen=True)
class Slice:
    """Where a slice of a sequence is.

    Attributes:
        span: Its tokens.
        seq_len: S.
        rows: B.
    """

    span: slice
    seq_len: int
    rows: int

    @classmethod
    def of(cls, batch: LocalBatch, rank: int) -> Slice:
        """One rank's slice of a batch, or of a region."""
        return cls(batch.layout.spans[rank], batch.layout.seq_len, batch.rows)


class ModuleOutputs:
    """What modules return in a run, in the order in which they finish."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._calls: Counter[str] = Counter()
        self.found: dict[_Call, tuple[str, list[Tensor]]] = {}

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self._names.get(id(module))
        if name is None:
            return
        tensors = [leaf.detach() for leaf in tree_leaves(output) if type(leaf) is Tensor and leaf.is_floating_point()]
        self.found[name, self._calls[name]] = type(module).__name__, tensors
        self._calls[name] += 1

    @contextmanager
    def watched(self, root: nn.Module) -> Iterator[None]:
        """Takes note of all modules below ``root`` that run inside."""
        self._names = {id(module): name for name, module in root.named_modules() if name}
        hook = register_module_forward_hook(self._note)
        try:
            yield
        finally:
            hook.remove()


def first_changed(
    whole: ModuleOutputs, part: ModuleOutputs, cut: Slice, bound: float, *, pooled: bool = False
) -> Change | None:
    """The first module that returns something else for the tokens of a slice.

    Args:
        whole: A run on all tokens.
        part: A run on a slice, or one that is split inside.
        cut: The slice.
        bound: The distance that counts as none.
        pooled: Whether to look for outputs without tokens instead, which encoders often have and nothing uses.
    """
    for call, (kind, tensors) in whole.found.items():
        _, others = part.found.get(call, ("", []))
        for one, other in zip(tensors, others, strict=False):
            is_pooled = one.shape == other.shape and one.numel() > 1
            distance = _by_token(one, other, cut) if not pooled else _distance(one, other) if is_pooled else 0.0
            if not distance <= bound:
                return Change(f"what {called(call[0], kind)} returns", distance)
    return None


def called(name: str, kind: str) -> str:
    """A module as messages call it, without the name that ``torch.compile`` gives to the one inside its wrapper."""
    clean = ".".join(part for part in name.split(".") if part != "_orig_mod")
    return f"{clean!r} ({kind})" if clean else kind


def result_change(whole: Any, part: Any, cut: Slice, bound: float) -> Change | None:
    """The first tensor that a step returns and that is neither the same nor a slice of that of the whole."""
    for one, other in zip(tree_leaves(whole), tree_leaves(part), strict=False):
        if not (isinstance(one, Tensor) and isinstance(other, Tensor) and one.is_floating_point()):
            continue
        distance = _distance(one, other) if one.shape == other.shape else _by_token(one, other, cut)
        if not distance <= bound:
            return Change("what it returns", distance, is_result=True)
    return None


def _by_token(whole: Tensor, part: Tensor, cut: Slice) -> float:
    """The largest distance of a token; 0 where ``part`` is not as long as a slice of ``whole``."""
    span, share = cut.span, cut.span.stop - cut.span.start
    dims = [dim for dim, (n, m) in enumerate(zip(whole.shape, part.shape, strict=False)) if n != m]
    if whole.dim() != part.dim() or len(dims) != 1:
        return 0.0
    # (B * S, ...); a router may have selected as many tokens as a row has, (S, ...).
    dim, rows = dims[0], 1 if dims[0] else cut.rows
    if (whole.shape[dim], part.shape[dim]) != (rows * cut.seq_len, rows * share):
        return 0.0
    # (B * S, ...) -> (B, S, ...) -> (S, B, ...), and (..., S, ...) -> (S, 1, ...)
    a = whole.unflatten(dim, (rows, cut.seq_len)).movedim(dim + 1, 0)[span]
    b = part.unflatten(dim, (rows, share)).movedim(dim + 1, 0)
    return 0.0 if torch.equal(a, b) else _distance(a, b, apart=True)


def _distance(a: Tensor, b: Tensor, *, apart: bool = False) -> float:
    if not a.numel():
        return 0.0
    if not apart:
        a, b = a[None], b[None]
    same = (a == b) | (a.isnan() & b.isnan())
    # (tokens, ...) -> (tokens,)
    moved = torch.where(same, 0.0, (a - b).float()).flatten(1).norm(dim=1)
    sizes = torch.where(a.isfinite(), a, 0.0).float().flatten(1).norm(dim=1)
    return float(moved.max() / sizes.square().mean().sqrt().clamp_min(1e-30))
