r"""What two runs of a step say of its loss.

Let A be what an attention call returned, L the loss on the whole excerpt and L_r that on slice r, where attention
answers with its slice of A. A mean over N targets, n_r of them in slice r, has L = sum_r (n_r / N) * L_r, so that

    dL/dA[slice r] = w_r * dL_r/dA[slice r],    w_r = n_r / N,

for every call of attention. The weights are measured and not believed: a tensor whose counts give them holds the
targets. A loss for which no number w_r will do is no such mean. Losses alone would not show it: that of DPO begins with
log 2 on every slice. Gradients alone would not either: a part of the loss may depend on no attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_ulysses.checks.trial.joints import Found, widest
from lightning_ulysses.checks.trial.outputs import Change, Slice, first_changed, result_change
from lightning_ulysses.checks.trial.replay import Recorder, Recording, Rehearsal, Replay, cut_dim, narrowed
from lightning_ulysses.context import LocalBatch
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.distance import largest
from lightning_ulysses.geometry.split_plan import SequencePlan

# Relative L2 differences that rounding in float32 does not reach, and a wrong loss surpasses.
INPUTS, GRADIENTS, WEIGHTS = 1e-4, 3e-5, 1e-4
# Relative differences of a logged number that rounding does not reach.
LOGS = 1e-4
# Where the model computes in half precision.
HALF = 0.1
# The same for single tokens, and for the weights of slices beside the nearest ones.
TOKENS_IN_HALF, COUNTS_IN_HALF = 0.2, 1e-2


def named_call(number: int, recorder: Recorder) -> str:
    """A call of attention, or of another function in which tokens meet, as messages call it."""
    name = recorder.callers[number] if number < len(recorder.callers) else ""
    return f"{recorder.recording.whats[number]} {number}" + (f", in {name}" if name else "")


@dataclass(frozen=True)
class SliceReport:
    """What one rank found on its slice.

    Attributes:
        counts: Valid targets of the slice, for each tensor that may hold them.
        weight: w_r; 0 where the loss of the slice depends on nothing.
        misfit: How far the gradient of the slice is from w_r times that of its own loss, relative to the whole one.
        moved: What is another value on the slice, before attention answers or after it.
        reason: Why nothing can be said; empty where the step itself will say so.
        fails: Whether the step raises on the slice, and not on the whole.
        is_half: Whether the model computes in half precision.
        pooled: Where an output without tokens differs first.
        losses: Those of the whole and of the slice.
        is_recorded: Whether the step ran on the whole, with a finite loss.
        is_empty: Whether the batch has no targets, outside of the excerpt as well.
        found: Submodules in which tokens meet, the next ones to run on more than a slice.
    """

    counts: Mapping[str, float]
    weight: float = 0.0
    misfit: float = 0.0
    moved: Change | None = None
    reason: str | None = None
    fails: bool = False
    is_half: bool = False
    pooled: Change | None = None
    losses: tuple[float, float] = (0.0, 0.0)
    is_recorded: bool = True
    is_empty: bool = False
    found: Found | None = None


def compare(recorder: Recorder, replay: Replay, local: LocalBatch, half: bool) -> SliceReport:
    """Compares a slice with the whole.

    Args:
        recorder: The run on the whole excerpt.
        replay: The run on the slice.
        local: The slice.
        half: Whether the model computes in half precision.
    """
    whole, part = recorder.recording, replay.recording
    counts, cut = local.counts, Slice(replay.span, local.layout.seq_len, local.rows)
    if len(part.outputs) != len(whole.outputs):
        return SliceReport(counts, reason=f"{len(part.outputs)} attention calls, and {len(whole.outputs)} on the whole")
    bound = TOKENS_IN_HALF if half else INPUTS
    moved = first_changed(whole.modules, part.modules, cut, bound)
    moved = moved or _first_moved(recorder, part, replay.span, replay.inside, HALF if half else INPUTS)
    if moved is None and whole.loss is None:
        moved = result_change(whole.returned, part.returned, cut, bound)
    if moved is not None:
        return SliceReport(counts, moved=moved)
    found = [*zip(whole.gradients, part.gradients, replay.narrowed, replay.inside, strict=False)]
    # Of what is whole here as well, the gradient is that of this slice alone.
    pairs = [(narrowed(a, dim, replay.span), b) for a, b, dim, is_inside in found if not is_inside]
    size = [a for a, *_, is_inside in found if not is_inside]
    for a, b in zip(whole.edge_gradients, part.edge_gradients, strict=False):
        dim = cut_dim(a, b)
        if dim is not None:
            # A convolution may return more than its slice, which its caller cuts off.
            pairs.append((narrowed(a, dim, replay.span), narrowed(b, dim, slice(0, cut.share))))
            size.append(a)
    if not pairs:
        return SliceReport(counts, reason="a loss that does not depend on what attention returns")
    wanted, own = zip(*pairs, strict=True)
    report = fit(wanted, own, flat(size).norm(), counts, half)
    losses = _number(whole.loss), _number(part.loss)
    pooled = first_changed(whole.modules, part.modules, cut, bound, pooled=True)
    return replace(report, pooled=pooled, losses=losses)


def _number(loss: Tensor | None) -> float:
    return 0.0 if loss is None else float(loss)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All elements of the tensors, (elements,) float64."""
    # Each (...) -> (elements,)
    return torch.cat([tensor.double().flatten() for tensor in tensors])


def fit(
    wanted: Sequence[Tensor], own: Sequence[Tensor], size: Tensor, counts: Mapping[str, float], half: bool
) -> SliceReport:
    """The number w for which w times the part's own gradients are nearest to the wanted ones."""
    a, b = flat(wanted), flat(own)
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()) or not float(size):
        return SliceReport(counts, reason="a gradient that is zero or not finite")
    square = float(b @ b)
    weight = float(a @ b) / square if square else 0.0
    return SliceReport(counts, weight, float((a - weight * b).norm() / size), is_half=half)


def disagreement(
    recorder: Recorder, part: Rehearsal, local: LocalBatch, mesh: SequenceMesh, half: bool, is_joined: bool
) -> Change | str | None:
    """What differs between a step on the whole sequence and one whose model is split inside.

    Behind a join everything is that of the whole sequence, and each of P ranks computes all of the loss: a slice gets
    the gradients of all of them. Without one, `part_of_loss` judges gradients.

    Args:
        recorder: The run on the whole excerpt.
        part: The run that is split.
        local: Its batch.
        mesh: Sizes and groups.
        half: Whether the model computes in half precision.
        is_joined: Whether the sequence is joined again.
    """
    whole, bound = recorder.recording, HALF if half else INPUTS
    if len(part.returned) != len(whole.outputs):
        return f"{len(part.returned)} attention calls, and {len(whole.outputs)} on the whole"
    for cut in part.cuts(local):
        moved = first_changed(whole.modules, part.recording.modules, cut, TOKENS_IN_HALF if half else INPUTS)
        if moved is not None:
            return moved
    if len(part.recording.gradients) < len(whole.gradients):
        return "a loss without a gradient"
    for number, region in enumerate(part.regions):
        own = part.recording.inputs[number]
        pairs = [(name, tensor, own[name]) for name, tensor in whole.inputs[number].items()]
        if not recorder.draws[number]:
            pairs.append(("output", whole.outputs[number], part.returned[number]))
        # Outside of regions, the gradient of one rank may be that of its slice alone.
        if whole.gradients and is_joined and region is not None:
            pairs.append(("gradient", whole.gradients[number], part.recording.gradients[number] / mesh.sp_size))
        for name, a, b in pairs:
            a = part.slice_of(number, a, b)
            distance = _distance(a, b) if a.shape == b.shape else float("inf")
            if not distance <= bound:
                return _in_attention(recorder, number, name, distance)
    losses = (whole.loss, part.recording.loss) if is_joined else (None, None)
    is_same = losses[0] is None or losses[1] is None or _distance(losses[0], losses[1]) <= bound
    return None if is_same else "the loss"


def part_of_loss(whole: Recording, part: Rehearsal, counts: Mapping[str, float], half: bool) -> SliceReport:
    """What the loss of a slice says where a plan splits the model and joins nothing."""
    found = zip(whole.gradients, part.recording.gradients, range(len(part.regions)), strict=False)
    # Of what is whole, a rank's gradient is that of its slice alone.
    cut = [(a, b, number) for a, b, number in found if part.regions[number] is not None]
    if not cut:
        return SliceReport(counts, reason="a loss that does not depend on what attention returns")
    wanted = [part.slice_of(number, a, b) for a, b, number in cut]
    return fit(wanted, [b for _, b, _ in cut], flat(a for a, _, _ in cut).norm(), counts, half)


def _distance(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a.double() - b.double()).norm() / a.double().norm().clamp_min(1e-30)) if a.numel() else 0.0


def _first_moved(whole: Recorder, part: Recording, span: slice, inside: Sequence[bool], bound: float) -> Change | None:
    for number, (one, other) in enumerate(zip(whole.recording.inputs, part.inputs, strict=True)):
        if inside[number]:
            continue
        for name, a in one.items():
            b = other[name]
            # (B, H, S, D) -> (B, H, S_r, D); keys of a memory are whole in both runs.
            a = narrowed(a, a.dim() - 2, span) if a.shape[-2] != b.shape[-2] else a
            distance = _distance(a, b) if a.shape == b.shape else float("inf")
            if not distance <= bound:
                return _in_attention(whole, number, name, distance)
    return None


def _in_attention(whole: Recorder, number: int, name: str, distance: float) -> Change:
    around = whole.recording.around[number]
    order = [*whole.recording.modules.found]
    place = order.index(around[0]) if around and around[0] in order else len(order)
    where = f"the {name} of {named_call(number, whole)}"
    return Change(where, distance, place=place, call=around[0] if around else None)


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
        fails: Whether the step raises on slices only.
        is_coarse: Whether the model computes in half precision.
        has_targets: Whether some group's batch has targets.
        plans: Plans that may divide the model, the same on all ranks.
        is_recorded: See `SliceReport`.
        pooled: See `SliceReport`.
        found: See `SliceReport`.
    """

    is_additive: bool = False
    names: frozenset[str] = frozenset()
    weights: tuple[float, ...] = ()
    misfit: float = 0.0
    moved: Change | None = None
    reason: str | None = None
    fails: bool = False
    is_coarse: bool = False
    has_targets: bool = True
    plans: tuple[SequencePlan, ...] = ()
    is_recorded: bool = True
    pooled: Change | None = None
    found: Found | None = None

    @property
    def is_known(self) -> bool:
        """Whether slices were compared with the whole."""
        return self.reason is None and self.moved is None

    @property
    def shows_fault(self) -> bool:
        """Whether slices of the batch are known to give another step."""
        return self.fails or self.moved is not None or self.reason is None

    @property
    def adds_up(self) -> bool:
        """Whether the loss is a sum over tokens, or one divided by a number that is that of the whole batch."""
        return self.is_additive and not self.names and all(abs(weight - 1) <= self._bound for weight in self.weights)

    @property
    def averages(self) -> bool:
        """Whether the loss is a mean over targets, or the mean of the slices' losses."""
        mean = 1 / max(len(self.weights), 1)
        same = all(abs(weight - mean) <= self._bound for weight in self.weights)
        return self.is_additive and (bool(self.names) or same)

    @property
    def _bound(self) -> float:
        return HALF if self.is_coarse else WEIGHTS


def judge(everyone: Sequence[SliceReport], sp_size: int) -> Verdict:
    """The verdict on all groups.

    Args:
        everyone: The report of every rank of the world.
        sp_size: P; consecutive ranks form a group.
    """
    groups = [everyone[first : first + sp_size] for first in range(0, len(everyone), sp_size)]
    # One without a target has no gradient, and shows nothing that others could not.
    telling = [group for group in groups if not any(report.is_empty and report.reason for report in group)]
    groups = telling or groups
    reports = [report for group in groups for report in group]
    reason = next((report.reason for report in reports if report.reason is not None), None)
    # The first change of any rank: later ones may follow from it.
    first = min((report for report in everyone if report.moved is not None), key=_place, default=None)
    moved = first.moved if first is not None else None
    if moved is not None:
        # A loss that says nothing on one rank does not take back what another one saw.
        reason = None
    if reason is not None or moved is not None:
        return Verdict(
            moved=moved,
            reason=reason,
            fails=any(report.fails for report in everyone),
            is_recorded=all(report.is_recorded for report in reports),
            has_targets=bool(telling),
            found=widest(each.found for each in everyone if (each.fails if moved is None else _shows(each, moved))),
        )
    half = any(report.is_half for report in reports)
    misfit, gap = largest(report.misfit for report in reports), largest(map(_gap, groups))
    additive = misfit <= (HALF if half else GRADIENTS) and gap <= (HALF if half else LOGS)
    names = frozenset.intersection(*(_fitting(group) for group in groups)) if additive else frozenset()
    weights = tuple(report.weight for report in groups[0])
    pooled = next((report.pooled for report in reports if report.pooled is not None), None)
    return Verdict(additive, names, weights, max(misfit, gap), is_coarse=half, pooled=pooled)


def _shows(report: SliceReport, moved: Change) -> bool:
    return report.moved is not None and report.moved.place == moved.place


def _place(report: SliceReport) -> int:
    return report.moved.place if report.moved is not None else 0


def _gap(group: Sequence[SliceReport]) -> float:
    """How far the weighted losses of slices are from that of the whole, relative to it."""
    whole = group[0].losses[0]
    return abs(whole - sum(report.weight * report.losses[1] for report in group)) / max(abs(whole), 1e-30)


def _fitting(group: Sequence[SliceReport]) -> frozenset[str]:
    """Tensors whose counts are the weights, up to rounding."""
    distances = {name: _distance_of(group, name) for name in set.intersection(*(set(each.counts) for each in group))}
    bound = WEIGHTS
    if any(report.is_half for report in group):
        bound = min(HALF, 2 * min(distances.values(), default=0.0) + COUNTS_IN_HALF)
    return frozenset(name for name, distance in distances.items() if distance <= bound)


def _distance_of(group: Sequence[SliceReport], name: str) -> float:
    total = sum(report.counts[name] for report in group)
    return largest(abs(report.weight - report.counts[name] / total) for report in group) if total else float("inf")
