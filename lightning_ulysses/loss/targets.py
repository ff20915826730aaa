"""Finds out which tensor of a batch holds the targets of the loss, from the cross entropies that the step computes.

Batches often have several candidates: ``labels`` and ``shift_labels`` differ by one target for each row and rank.
Weights from the wrong tensor would give slightly wrong gradients.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.batch_keys import KEPT
from lightning_ulysses.loss.evidence import LossEvidence, LossWatch, TargetEvidence
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.patching.outside_graphs import eager

# Scores: the candidate contradicts the loss, may fit, has the right number of targets, has the same targets.
_NO, _UNKNOWN, _COUNT, _CONTENT = range(4)
# A candidate that is only the best one, and not certain, is settled after so many steps.
_SETTLE_AFTER = 3
# Derived targets that the module does not get: it shifts its own tokens.
_HIDDEN = ("shift_input_ids", "shift_batch")
# With class weights a mean divides by the sum of the weights, not by the number of targets. No candidate fits.
_CLASS_WEIGHTS = "class weights"
# The labels that each mask belongs to.
_LABELS_OF = {"loss_mask": ("labels", "shift_labels"), "shift_loss_mask": ("shift_labels",)}


def install(context: SequenceContext) -> Handle:
    """Patches torch's cross entropies to record their targets, while the tensor with the targets is not settled."""
    handle = Handle()
    functional: Any = torch.nn.functional
    losses = context.notes.of(LossWatch)

    def watch(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(original)
        def loss_of(input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            result = original(input, target, *args, **kwargs)
            # Not `context.region`: with a plan that joins, the loss is computed after the region.
            place = context.place
            # Floating-point targets are class probabilities, which have no ignore_index.
            wanted = losses.is_open and not target.is_floating_point()
            if wanted and place.batch is not None:
                _note(place.batch, result, target, *args, **kwargs)
            return result

        return loss_of

    for name in ("cross_entropy", "nll_loss"):
        handle.patch(functional, name, watch(getattr(functional, name)))
    return handle


@eager
def _note(batch: LocalBatch, result: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> None:
    """Records a cross entropy. The further arguments are those of ``cross_entropy`` after ``target``."""
    if type(target).__module__.startswith("torch._subclasses"):
        # A FakeTensor: the compiler calls the function while it traces a graph.
        return
    # Positional arguments after the target: weight, size_average, ignore_index, reduce, reduction
    ignore_index = kwargs.get("ignore_index", args[2] if len(args) > 2 else -100)
    reduction = kwargs.get("reduction", args[4] if len(args) > 4 else "mean")
    weight = kwargs.get("weight", args[0] if args else None)
    name = _CLASS_WEIGHTS if weight is not None and reduction == "mean" else None
    evidence = TargetEvidence(target.detach(), ignore_index, reduction == "mean", name, result.detach())
    batch.notes.of(LossEvidence).found.append(evidence)


def _explains(name: str, evidence: TargetEvidence, live: LocalBatch) -> int:
    """The score of tensor ``name`` for a mean over the targets of ``evidence``."""
    assert evidence.target is not None
    if float((evidence.target != evidence.ignore_index).sum()) != live.seen[name]:
        return _NO
    shard = live.shards.get(name)
    if shard is None or shard.numel() != evidence.target.numel():
        return _COUNT
    # (B, S_r) -> (B * S_r,)
    aligned = shard.reshape(-1).to(evidence.target.device)
    return _CONTENT if torch.equal(aligned, evidence.target.reshape(-1).to(aligned.dtype)) else _COUNT


def _score(name: str, evidence: TargetEvidence, live: LocalBatch) -> int:
    """The score of one candidate for one cross entropy."""
    if evidence.name is not None:
        return _CONTENT if evidence.name == name else _NO
    if evidence.is_mean:
        return _explains(name, evidence, live)
    # The module takes the mean itself, with a mask that is not seen here. The labels tell which mask belongs to them.
    if name in _LABELS_OF:
        labels = next((label for label in _LABELS_OF[name] if label in live.seen), None)
        return _UNKNOWN if labels is None else max(_UNKNOWN, _explains(labels, evidence, live))
    # If the batch has a mask, the module's mean goes by it.
    if name in _HIDDEN or any(mask in live.counts for mask in _LABELS_OF):
        return _NO
    if name == "tokens":
        # No better score: a module that masks by hand computes the cross entropy over all tokens as well.
        return min(_UNKNOWN, _explains(name, evidence, live))
    return max(_UNKNOWN, _explains(name, evidence, live))


def score_names(live: LocalBatch, names: Iterable[str]) -> dict[str, int]:
    """The score of each candidate for all cross entropies of a batch: its lowest one."""
    found = live.notes.of(LossEvidence).found
    return {
        # Without any cross entropy, shifted tokens are no likely targets; everything else may be.
        name: min((_score(name, e, live) for e in found), default=_NO if name in _HIDDEN else _UNKNOWN)
        for name in names
    }


def counts_agree(live: LocalBatch, names: Iterable[str]) -> bool:
    """Whether all candidates have the same number of targets, so that any of them gives the same weights."""
    return len({live.counts[name] for name in names if name != "tokens" and not name.endswith(KEPT)}) <= 1


def choose_names(scores: Mapping[str, int], all_equal: bool, live: LocalBatch) -> tuple[list[str], bool]:
    """The best candidates, of which any may be used, and whether a single one is certain.

    Args:
        scores: For each candidate its lowest score over all ranks.
        all_equal: Whether `counts_agree` on all ranks.
        live: A batch, for the error message.

    Raises:
        UlyssesError: If no candidate or no single one explains the loss.
    """
    if not scores:
        raise _uncountable(live)
    best = max(scores.values())
    chosen = [name for name in sorted(scores) if scores[name] == best]
    if best == _NO:
        raise _unexplained(live)
    if best == _UNKNOWN:
        # Without evidence, labels are more likely the targets than all tokens.
        chosen = [name for name in chosen if name != "tokens"] or chosen
    if len(chosen) > 1 and not all_equal:
        raise _ambiguous(chosen, live)
    return chosen, len(chosen) == 1 and best == _CONTENT


class AmbiguousTargets(UlyssesError):
    """Raised where several tensors could hold the targets."""


class TargetResolver:
    """Settles the name of the tensor that holds the targets, with the same result on all ranks.

    Args:
        explicit: The strategy's argument ``targets``, if given.
        agree: Reduces a small int64 tensor to its minimum over all ranks.

    Attributes:
        settled: The name, as soon as it is certain.
        proven: Names that a trial of the step has shown to fit; empty without one.
    """

    def __init__(self, explicit: str | None, agree: Callable[[Tensor], Tensor]) -> None:
        self.settled = explicit
        self.proven: frozenset[str] = frozenset()
        self._explicit = explicit
        self._agree = agree
        self._attempts = 0

    def resolve(self, live: LocalBatch, names: Iterable[str]) -> str:
        """The name of the tensor with the targets; a collective until it is settled.

        Args:
            live: The batch of the running step, with its evidence.
            names: The candidates that every rank has.

        Raises:
            UlyssesError: On every rank, if no candidate or no single one explains the loss.
        """
        if self.settled is not None:
            self.check(live.counts)
            return self.settled
        # What cross entropies show is labels; other masks are found by the trial of the step alone.
        open_names = sorted(name for name in set(names) if not name.endswith(KEPT))
        open_names = [name for name in open_names if name in self.proven] or open_names
        scores = score_names(live, open_names)
        # The minimum over ranks: a candidate must explain the loss on every rank.
        *lowest, all_equal = self._agree(
            torch.tensor([*scores.values(), counts_agree(live, open_names)], dtype=torch.int64)
        ).tolist()
        chosen, is_certain = choose_names(dict(zip(scores, lowest, strict=True)), bool(all_equal), live)
        self._attempts += 1
        if is_certain or (len(chosen) == 1 and self._attempts >= _SETTLE_AFTER):
            self.settled = chosen[0]
        return chosen[0]

    def check(self, counts: Mapping[str, float]) -> None:
        """Raises `UlyssesError` if a batch lacks the tensor with the targets."""
        # NaN marks a name that another rank lacks, see `StepWeights`.
        if self.settled is None or not math.isnan(counts.get(self.settled, math.nan)):
            return
        explicit, name = self._explicit is not None, self.settled.removesuffix(KEPT)
        raise UlyssesError(
            f"targets={name!r}" if explicit else f"a batch without {name!r}, the targets so far",
            f"one of {sorted(counts)}, the tensors of this batch that may hold targets"
            if explicit
            else f"the same keys in the batches of all ranks and steps; this one has {sorted(counts)}",
            "change targets in the strategy" if explicit else "have the collate function make them for every batch",
        )


def _unexplained(live: LocalBatch) -> UlyssesError:
    seen = [
        f"{int((e.target != e.ignore_index).sum())} targets (ignore_index={e.ignore_index})"
        + (f" with {_CLASS_WEIGHTS}" if e.name == _CLASS_WEIGHTS else "")
        for e in live.notes.of(LossEvidence).found
        if e.target is not None
    ]
    return UlyssesError(
        f"a loss over {', '.join(seen) or 'targets of its own'} on some rank, while this rank's slice has "
        f"{live.seen} valid targets",
        "a mean over the targets of one tensor of the batch",
        "use batch['shift_labels'] instead of shifting inside the step, set ignore_index or targets in the "
        "strategy, or set loss_weighting='none' if the loss is no mean over tokens",
    )


def _uncountable(live: LocalBatch) -> UlyssesError:
    if not live.layout.num_padding:
        return UlyssesError(
            "batches that have no tensor in common that can hold the targets",
            "the same keys in the batches of all ranks and steps",
            "have the collate function make them for every batch",
        )
    return UlyssesError(
        f"a batch padded by {live.layout.num_padding} tokens, none of whose tensors can hold the targets",
        "integer labels or a loss_mask, in which padding can be marked to be ignored",
        "leave pad_to_multiple_of out; no multiple is required",
    )


def _ambiguous(chosen: list[str], live: LocalBatch) -> AmbiguousTargets:
    return AmbiguousTargets(
        f"a loss that could be a mean over any of {chosen}, with {live.counts} targets on this rank",
        "to know which of them the loss is a mean over",
        f"set targets={chosen[-1]!r} (or another of them) in the strategy",
    )
