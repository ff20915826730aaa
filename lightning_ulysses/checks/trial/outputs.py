"""Compares what modules return on an excerpt with what they return on a slice of it.

Attention answers alike in both runs, so that each module that keeps tokens apart returns its slice. The first module
that does not mixes tokens, or takes positions from the length of what it gets.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_ulysses.divided import Divided, Division
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.patching.handle import Handle

# The name of a module, and how often it was called before.
Call = tuple[str, int]


@dataclass(frozen=True)
class Change:
    """What differs between two runs.

    Attributes:
        where: What it is, such as ``"what 'conv' (Conv1d) returns"``.
        distance: By how much, relative to the size of a token.
        is_result: Whether it is what the step itself returns, and not anything inside.
        place: Which of the calls that finish in the whole shows it.
        call: That call, or the one in which it was seen.
    """

    where: str
    distance: float
    is_result: bool = False
    place: int = 0
    call: Call | None = None


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

    @property
    def share(self) -> int:
        """S_r."""
        return self.span.stop - self.span.start

    @classmethod
    def of(cls, layout: SequenceLayout, rows: int, rank: int) -> Slice:
        """One rank's slice of a batch, or of a region."""
        return cls(layout.spans[rank], layout.seq_len, rows)


@dataclass(frozen=True)
class OwnSlice:
    """What a run on slices has of a value that is divided over ranks.

    No tensor: one rank may compare values while the others do not, and a divided tensor asks for the others.

    Attributes:
        local: This rank's slice.
        division: How the value is divided.
    """

    local: Tensor
    division: Division

    def of(self, whole: Tensor) -> Tensor | None:
        """The same slice of what one process has; None if that has another shape."""
        shape = list(self.local.shape)
        shape[self.division.dim] = self.division.size
        return self.division.cut(whole, self.division.dim) if list(whole.shape) == shape else None


@dataclass
class Called:
    """A call of a module.

    Attributes:
        kind: Its class.
        around: The calls in which it is made, the innermost one first.
        inputs: What it got, by parameter name or position.
        output: What it returned; None if it has not.
    """

    kind: str
    around: tuple[Call, ...]
    inputs: dict[str, Any]
    output: Any = None

    @property
    def tensors(self) -> list[Tensor]:
        """Those of floats that it returned."""
        return [leaf for leaf in tree_leaves(self.output) if type(leaf) is Tensor and leaf.is_floating_point()]


class ModuleOutputs:
    """What modules get and return in a run.

    Attributes:
        found: Calls in the order in which they finish.
        open: Calls that have not finished, the innermost one last.
    """

    def __init__(self) -> None:
        self._calls: Counter[str] = Counter()
        self.found: dict[Call, Called] = {}
        self.open: list[tuple[Call, Called]] = []

    @property
    def around(self) -> tuple[Call, ...]:
        """The calls that run at this moment, the innermost one first."""
        return tuple(call for call, _ in reversed(self.open))

    @contextmanager
    def watched(self, root: nn.Module) -> Iterator[None]:
        """Takes note of all modules below ``root`` that run inside."""
        handle = Handle()
        for name, module in root.named_modules():
            if name:
                self._watch(name, module, handle)
        try:
            yield
        finally:
            handle.remove()

    def _watch(self, name: str, module: nn.Module, handle: Handle) -> None:
        by_name = arguments_of(module)

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = (name, self._calls[name])
            self._calls[name] += 1
            self.open.append((call, Called(type(module).__name__, self.around, detached(by_name(args, kwargs)))))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            # Those inside that failed, where what runs around them has gone on.
            while self.open and self.open[-1][0][0] != name:
                self.open.pop()
            if self.open:
                call, noted = self.open.pop()
                noted.output = detached(output)
                self.found[call] = noted

        # Before hooks that join inputs, and behind those that cut outputs.
        handle.add(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove)
        handle.add(module.register_forward_hook(leave).remove)


def arguments_of(module: nn.Module) -> Callable[[Any, Any], dict[str, Any]]:
    """Gives the arguments of a call their names. Positions stand for names that a forward does not have."""
    parameters = inspect.signature(module.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]

    def by_name(args: Any, kwargs: Any) -> dict[str, Any]:
        return {**{names[i] if i < len(names) else str(i): value for i, value in enumerate(args)}, **kwargs}

    return by_name


def detached(values: Any) -> Any:
    """Nested values without their graph, and with an `OwnSlice` of each divided one."""
    return tree_map(_detached, values)


def _detached(leaf: Any) -> Any:
    if isinstance(leaf, Divided):
        return OwnSlice(leaf.local.detach(), leaf.division)
    return leaf.detach() if type(leaf) is Tensor else leaf


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
    for place, (call, one) in enumerate(whole.found.items()):
        other = part.found.get(call)
        pairs = [] if other is None else zip(one.tensors, other.tensors, strict=False)
        for a, b in pairs:
            is_pooled = a.shape == b.shape and a.numel() > 1
            distance = _by_token(a, b, cut) if not pooled else distance_of(a, b) if is_pooled else 0.0
            if not distance <= bound:
                return Change(f"what {called(call[0], one.kind)} returns", distance, place=place, call=call)
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
        distance = distance_of(one, other) if one.shape == other.shape else _by_token(one, other, cut)
        if not distance <= bound:
            return Change("what it returns", distance, is_result=True)
    return None


def _by_token(whole: Tensor, part: Tensor, cut: Slice) -> float:
    """The largest distance of a token; 0 where ``part`` is not as long as a slice of ``whole``."""
    span, share = cut.span, cut.share
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
    return 0.0 if torch.equal(a, b) else distance_of(a, b, apart=True)


def distance_of(a: Tensor, b: Tensor, *, apart: bool = False) -> float:
    """The largest distance of two tensors of one shape, of each entry of the first dimension if ``apart``."""
    if not a.numel():
        return 0.0
    if not apart:
        a, b = a[None], b[None]
    same = (a == b) | (a.isnan() & b.isnan())
    # (tokens, ...) -> (tokens,)
    moved = torch.where(same, 0.0, (a - b).float()).flatten(1).norm(dim=1)
    sizes = torch.where(a.isfinite(), a, 0.0).float().flatten(1).norm(dim=1)
    return float(moved.max() / sizes.square().mean().sqrt().clamp_min(1e-30))
