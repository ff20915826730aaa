r"""What two runs of a step say of its loss.

Let A be what an attention call returned, L the loss on the whole excerpt and L_r that on slice r, where attention
answers with its slice of A. A mean over N targets, n_r of them in slice r, has L = sum_r (n_r / N) * L_r, so that

    dL/dA[slice r] = w_r * dL_r/dA[slice r],    w_r = n_r / N,

for every call of attention. The weights are measured and not believed: a tensor whose counts give them holds the
targets. A loss for which no number w_r will do is no such mean. Losses alone would not show it: that of DPO begins with
log 2 on every slice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lightning_ulysses.checks.trial.replay import Recording, Replay, narrowed

# Relative L2 differences that rounding in float32 does not reach, and a wrong loss surpasses.
INPUTS, GRADIENTS, WEIGHTS = 1e-3, 3e-5, 1e-4
# Where the model computes in half precision.
HALF = 0.1


@dataclass(frozen=True)
class SliceReport:
    """What one rank found on its slice.

    Attributes:
        counts: Valid targets of the slice, for each tensor that may hold them.
        weight: w_r; 0 where the loss of the slice depends on nothing.
        misfit: How far the gradient of the slice is from w_r times that of its own loss, relative to the whole one.
        moved: For the attention call that first got other inputs its number, which of them, and by how much.
        reason: Why nothing can be said; empty where the step itself will say so.
        is_half: Whether the model computes in half precision.
    """

    counts: Mapping[str, float]
    weight: float = 0.0
    misfit: float = 0.0
    moved: tuple[int, str, float] | None = None
    reason: str | None = None
    is_half: bool = False


def compare(whole: Recording, replay: Replay, counts: Mapping[str, float], half: bool) -> SliceReport:
    """Compares a slice with the whole.

    Args:
        whole: The run on the whole excerpt.
        replay: The run on the slice.
        counts: Valid targets of the slice.
        half: Whether the model computes in half precision.
    """
    part = replay.recording
    if len(part.outputs) != len(whole.outputs):
        return SliceReport(counts, reason=f"{len(part.outputs)} attention calls, and {len(whole.outputs)} on the whole")
    moved = _first_moved(whole, part, replay.span, HALF if half else INPUTS)
    if moved is not None:
        return SliceReport(counts, moved=moved)
    if not whole.gradients or not part.gradients:
        return SliceReport(counts, reason="a loss that does not depend on what attention returns")
    pairs = zip(whole.gradients, replay.narrowed, strict=True)
    wanted = torch.cat([narrowed(gradient, dim, replay.span).double().flatten() for gradient, dim in pairs])
    found = torch.cat([gradient.double().flatten() for gradient in part.gradients])
    size = torch.cat([gradient.double().flatten() for gradient in whole.gradients]).norm()
    if not bool(torch.isfinite(found).all() and torch.isfinite(wanted).all()) or not float(size):
        return SliceReport(counts, reason="a gradient that is zero or not finite")
    square = float(found @ found)
    weight = float(wanted @ found) / square if square else 0.0
    return SliceReport(counts, weight, float((wanted - weight * found).norm() / size), is_half=half)


def _first_moved(whole: Recording, part: Recording, span: slice, bound: float) -> tuple[int, str, float] | None:
    for number, (one, other) in enumerate(zip(whole.inputs, part.inputs, strict=True)):
        for name, a, b in zip("qkv", one, other, strict=True):
            # (B, H, S, D) -> (B, H, S_r, D); keys of a memory are whole in both runs.
            a = narrowed(a, a.dim() - 2, span) if a.shape[-2] != b.shape[-2] else a
            if a.shape != b.shape:
                return number, name, float("inf")
            distance = float((a.double() - b.double()).norm() / a.double().norm().clamp_min(1e-30))
            if not distance <= bound:
                return number, name, distance
    return None


@dataclass(frozen=True)
class Verdict:
    """What all ranks found together.

    Attributes:
        is_additive: Whether slices add up to the whole with one weight each.
        names: Tensors whose counts are the weights.
        weights: The weights of one group.
        misfit: The worst of all slices.
        moved: See `SliceReport`.
        reason: Why nothing can be said.
        is_coarse: Whether rounding is too large to tell tensors apart by their counts.
    """

    is_additive: bool = False
    names: frozenset[str] = frozenset()
    weights: tuple[float, ...] = ()
    misfit: float = 0.0
    moved: tuple[int, str, float] | None = None
    reason: str | None = None
    is_coarse: bool = False

    @property
    def averages(self) -> bool:
        """Whether the loss is a mean over targets, or the mean of the slices' losses."""
        mean = 1 / max(len(self.weights), 1)
        same = all(abs(weight - mean) <= WEIGHTS for weight in self.weights)
        return self.is_additive and (bool(self.names) or same)


def judge(reports: Sequence[SliceReport], sp_size: int) -> Verdict:
    """The verdict on all groups.

    Args:
        reports: Of every rank of the world.
        sp_size: P; consecutive ranks form a group.
    """
    reason = next((report.reason for report in reports if report.reason is not None), None)
    moved = next((report.moved for report in reports if report.moved is not None), None)
    if reason is not None or moved is not None:
        return Verdict(moved=moved, reason=reason)
    misfit = max(report.misfit for report in reports)
    names: set[str] = set.intersection(*(set(report.counts) for report in reports))
    worst: tuple[float, ...] = ()
    for first in range(0, len(reports), sp_size):
        group = reports[first : first + sp_size]
        worst = worst or tuple(report.weight for report in group)
        names = {name for name in names if _explains(group, name)}
    half = any(report.is_half for report in reports)
    additive = misfit <= (HALF if half else GRADIENTS)
    return Verdict(additive, frozenset(names) if additive else frozenset(), worst, misfit, is_coarse=half)


def _explains(group: Sequence[SliceReport], name: str) -> bool:
    total = sum(report.counts[name] for report in group)
    bound = HALF if any(report.is_half for report in group) else WEIGHTS
    return bool(total) and all(abs(report.weight - report.counts[name] / total) <= bound for report in group)
