"""Finds the submodule in which tokens meet outside of attention, and how it may run: with a halo, or joined."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_ulysses.attention.whole_mask import is_stand_in
from lightning_ulysses.checks.trial.blocks import outputs_of
from lightning_ulysses.checks.trial.outputs import Call, Called, ModuleOutputs, OwnSlice, Slice, distance_of
from lightning_ulysses.checks.trial.samples import is_tensor
from lightning_ulysses.geometry.joint import PADDED, Halo, Joined, Joint
from lightning_ulysses.geometry.split_plan import SequencePlan
from lightning_ulysses.regions.matching import clean_name, submodules
from lightning_ulysses.regions.reach import reach_of


@dataclass(frozen=True)
class Found:
    """Submodules that may run on more than a slice.

    Attributes:
        names: Of the one that was found, and of others like it.
        joint: How they run.
    """

    names: tuple[str, ...]
    joint: Joint


class JointFinder:
    """Looks for the smallest submodule that returns something else on a slice of what it got on the whole.

    Args:
        root: The user's LightningModule.
    """

    def __init__(self, root: nn.Module) -> None:
        self._modules = {".".join(parts): module for parts, module in submodules(root).items() if parts}

    def find(
        self,
        whole: ModuleOutputs,
        part: ModuleOutputs,
        cut: Slice,
        call: Call | None,
        bound: float,
        known: Mapping[str, Joint],
    ) -> Found | None:
        """The innermost one around a change whose inputs are slices of those on the whole.

        Args:
            whole: The run on all tokens.
            part: The run on a slice, or one that is split inside.
            cut: The slice.
            call: Where the change was seen; None where the run on the slice has failed.
            bound: The distance that counts as none.
            known: Those that run on more than their slice already.
        """
        chain = part.around if call is None else (call, *(whole.found[call].around if call in whole.found else ()))
        others = {**dict(part.open), **part.found}

        def pair(each: Call) -> tuple[str, nn.Module, Called, Called] | None:
            name, one, other = clean_name(each[0]), whole.found.get(each), others.get(each)
            module = self._modules.get(name)
            return None if one is None or other is None or module is None else (name, module, one, other)

        for outer in chain:
            # A convolution inside may return more tokens than it gets, which its caller cuts off.
            inner = (each for each, called in whole.found.items() if outer in called.around)
            for each in (outer, *inner):
                found = pair(each)
                if found is not None and found[0] not in known:
                    halo = _halo(*found[1:], cut, bound)
                    if halo is not None:
                        return Found(self._alike(found[0]), halo)
            found = pair(outer)
            if found is not None and not isinstance(known.get(found[0]), Joined):
                joined = _joined(*found[2:], cut, bound)
                if joined is not None:
                    return Found(self._alike(found[0]), joined)
        return None

    def _alike(self, name: str) -> tuple[str, ...]:
        """The modules of the same class at the same place of other blocks."""
        kind, pattern = type(self._modules[name]), _pattern(name)
        alike = (name for name, module in self._modules.items() if type(module) is kind)
        return tuple(name for name in alike if _pattern(name) == pattern)

    def is_around(self, name: str, plan: SequencePlan) -> bool:
        """Whether a module is split itself by a plan, or holds one that is."""
        names = [other for other in self._modules if any(_fits(other, pattern) for pattern in plan.split)]
        return any(other == name or other.startswith(f"{name}.") for other in names)

    def kind(self, pattern: str) -> str:
        """The class of the modules that a pattern fits."""
        return next(type(module).__name__ for name, module in self._modules.items() if _fits(name, pattern))

    def patterns(self, joints: Mapping[str, Joint]) -> dict[str, Joint]:
        """The same joints, with one pattern in place of names where it fits no other module."""
        found: dict[str, Joint] = {}
        for name, joint in joints.items():
            pattern = _pattern(name)
            fitting = [other for other in self._modules if _fits(other, pattern)]
            is_shared = len(fitting) > 1 and all(joints.get(other) == joint for other in fitting)
            found[pattern if is_shared else name] = joint
        return found


def widest(found: Iterable[Found | None]) -> Found | None:
    """What all of these ranks may run joined: what the one needs that goes furthest out; None if one finds nothing.

    Inputs that are slices of those of one process on one rank may be none on another, such as positions from 0 on.
    """
    everyone = [*found]
    known = [each for each in everyone if each is not None]
    return min(known, key=lambda each: each.names[0].count(".")) if known and len(known) == len(everyone) else None


def added(joints: Mapping[str, Joint], found: Found) -> dict[str, Joint]:
    """The joints with those that were found, and without those inside of them."""
    kept = {
        name: joint for name, joint in joints.items() if not any(name.startswith(f"{outer}.") for outer in found.names)
    }
    return {**kept, **dict.fromkeys(found.names, found.joint)}


def _pattern(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _fits(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _cut_along(one: Tensor, other: Tensor) -> int | None:
    """The only dimension in which the shapes differ."""
    dims = [dim for dim, (a, b) in enumerate(zip(one.shape, other.shape, strict=False)) if a != b]
    return dims[0] if one.dim() == other.dim() and len(dims) == 1 else None


def _is_same(one: Tensor, other: Tensor, bound: float) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return distance_of(one, other) <= bound if one.is_floating_point() else torch.equal(one, other)


def _joined(one: Called, other: Called, cut: Slice, bound: float) -> Joined | None:
    """How a module is joined whose inputs are slices, or the same, in both runs."""
    inputs: dict[str, int | None] = {}
    for key, value in one.inputs.items():
        dims = set(_dims(value, other.inputs.get(key), cut, bound))
        if len(dims) > 1 or _UNLIKE in dims:
            return None
        if dims:
            inputs[key] = dims.pop()
    # A slice may get more, such as labels that are shifted already: models hand on what they do not know.
    if not inputs or not one.inputs.keys() <= other.inputs.keys():
        return None
    outputs: dict[str, int] = {}
    alike = {value.shape: dim for key, value in one.inputs.items() if (dim := inputs.get(key)) and is_tensor(value)}
    given = outputs_of(other.output) if other.output is not None else None
    for key, value in outputs_of(one.output).items():
        found = set(_output_dims(value, None if given is None else given.get(key), cut, alike))
        if len(found) > 1 or _UNLIKE in found:
            return None
        if found:
            outputs[key] = found.pop()
    return Joined(inputs, outputs) if outputs else None


# In place of a dimension: what is no slice of the other.
_UNLIKE = -1


def _dims(one: Any, other: Any, cut: Slice, bound: float) -> Iterator[int]:
    """The dimension of each tensor in a value that is a slice in the other run."""
    leaves, others = tree_leaves(one), tree_leaves(other)
    if len(leaves) != len(others):
        yield _UNLIKE
    for a, b in zip(leaves, others, strict=False):
        if isinstance(b, OwnSlice):
            # Whole for whoever reads it.
            own = b.of(a) if isinstance(a, Tensor) else None
            if own is None or not _is_same(own, b.local, bound):
                yield _UNLIKE
        elif isinstance(b, Tensor) and is_stand_in(b):
            # A mask that gets its values where it is joined; one process may do without.
            continue
        elif not isinstance(a, Tensor) or not isinstance(b, Tensor):
            # Caches and switches may differ between the runs; a length that is passed on may not.
            if isinstance(a, Tensor) or isinstance(b, Tensor) or (a == cut.seq_len and b == cut.share):
                yield _UNLIKE
        elif a.shape != b.shape:
            dim = _cut_along(a, b)
            is_slice = dim is not None and (a.shape[dim], b.shape[dim]) == (cut.seq_len, cut.share)
            own = a.narrow(dim, cut.span.start, cut.share) if is_slice and dim is not None else a
            yield dim if is_slice and dim is not None and _is_same(own, b, bound) else _UNLIKE
        elif not _is_same(a, b, bound):
            yield _UNLIKE


def _output_dims(one: Any, other: Any, cut: Slice, alike: Mapping[torch.Size, int]) -> Iterator[int]:
    """The dimension of each tensor in an output that is a slice in the other run.

    Args:
        one: The output on the whole.
        other: The same in the other run; None where that has failed.
        cut: The slice.
        alike: For shapes of inputs the dimension that carries the sequence.
    """
    others = tree_leaves(other) if other is not None else []
    for place, a in enumerate(tree_leaves(one)):
        b = others[place] if place < len(others) else None
        if not isinstance(a, Tensor) or isinstance(b, OwnSlice):
            continue
        if not isinstance(b, Tensor):
            # The run on the slice has failed: excerpts have lengths that nothing else has.
            dims = [dim for dim, size in enumerate(a.shape) if size == cut.seq_len]
            # One of pairs of tokens stays whole; features may be as many as tokens.
            yield from dims if len(dims) < 2 else [alike[a.shape]] if a.shape in alike else []
        elif a.shape != b.shape and not _is_of_pairs(a, b, cut):
            dim = _cut_along(a, b)
            is_slice = dim is not None and (a.shape[dim], b.shape[dim]) == (cut.seq_len, cut.share)
            yield dim if is_slice and dim is not None else _UNLIKE


def _is_of_pairs(one: Tensor, other: Tensor, cut: Slice) -> bool:
    """Whether a tensor has two dimensions of tokens, such as a bias of distances, (..., S, S) and (..., S_r, S_r)."""
    pairs = [(a, b) for a, b in zip(one.shape, other.shape, strict=False) if a != b]
    return one.dim() == other.dim() and pairs == [(cut.seq_len, cut.share)] * 2


def _halo(module: nn.Module, one: Called, other: Called, cut: Slice, bound: float) -> Halo | None:
    """The halo of a convolution or pooling whose input is a slice, perhaps between zeros."""
    a, b = (next(iter(call.inputs.values()), None) for call in (one, other))
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or not a.is_floating_point():
        return None
    dim = _cut_along(a, b)
    if dim is None or a.shape[dim] - b.shape[dim] != cut.seq_len - cut.share:
        return None
    extra = b.shape[dim] - cut.share
    # (..., S_r + extra, ...) -> (S_r + extra, ...)
    own, begin = b.movedim(dim, 0), cut.span.start
    pairs = zip(a.movedim(dim, 0)[begin : begin + len(own)], own, strict=True)
    same = [_is_same(x, y, bound) for x, y in pairs]
    if True not in same:
        return None
    # Zeros of a slice lie where the whole has tokens: before any slice but the first, and behind it.
    before = same.index(True) if begin else extra - same[::-1].index(True)
    padding = torch.cat([own[:before], own[before + cut.share :]]) if 0 <= before <= extra else own
    if not all(same[before : before + cut.share]) or bool(padding.any()):
        return None
    padded = next((key for key, part in PADDED.items() if int(extra * part) == before), None)
    reach = reach_of(module, dim, a.dim(), before)
    is_local = reach is not None and reach.before + reach.after > 0
    return Halo(dim, padded) if padded is not None and is_local else None
