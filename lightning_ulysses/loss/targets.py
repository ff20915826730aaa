"""Which tensor of a batch holds the targets of the loss, once a trial of the step or the user has said it.

Batches often have several candidates: ``labels`` and ``shift_labels`` differ by one target for each row and rank.
Weights from the wrong tensor would give slightly wrong gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ulysses.context import LocalBatch
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.batch_keys import KEPT

# Candidates that most likely hold the targets.
_FIRST = ("shift_labels", "labels", "shift_loss_mask", "loss_mask")
# Derived targets that the module does not get: it shifts its own tokens.
_HIDDEN = ("shift_input_ids", "shift_batch")


@dataclass
class KnownTargets:
    """A note on a batch.

    Attributes:
        name: The tensor that a transformers model computes its loss from, if it got labels.
    """

    name: str | None = None


class AmbiguousTargets(UlyssesError):
    """Raised where several tensors could hold the targets."""


def likeliest_first(names: Iterable[str]) -> list[str]:
    """Labels before masks, masks before other tensors, and all tokens last."""

    def order(name: str) -> tuple[int, bool, bool]:
        return _FIRST.index(name) if name in _FIRST else len(_FIRST), name == "tokens", name in _HIDDEN

    return sorted(sorted(names), key=order)


def likely(names: Iterable[str]) -> list[str]:
    """The candidates of a step that nobody has tried: labels, else all tokens. Other masks may mean anything."""
    names = [name for name in names if not name.endswith(KEPT) and name not in _HIDDEN]
    return likeliest_first([name for name in names if name != "tokens"] or names)


def counts_agree(live: LocalBatch, names: Iterable[str]) -> bool:
    """Whether all candidates have the same number of targets, so that any of them gives the same weights."""
    return len({live.counts[name] for name in names}) <= 1


class TargetResolver:
    """Settles the name of the tensor that holds the targets, with the same result on all ranks.

    Args:
        explicit: The strategy's argument ``targets``, if given.
        agree: Reduces a small int64 tensor to its minimum over all ranks.
        guesses: Whether the likeliest candidate is taken where several differ, for runs that are only compared.

    Attributes:
        settled: The name, as soon as it is certain.
    """

    def __init__(self, explicit: str | None, agree: Callable[[Tensor], Tensor], *, guesses: bool = False) -> None:
        self.settled = explicit
        self._guesses = guesses
        self._explicit = explicit
        self._agree = agree

    def resolve(self, live: LocalBatch, totals: Mapping[str, float]) -> str:
        """The name of the tensor with the targets of a step that was not tried; a collective until it is settled.

        Args:
            live: The batch of the running step.
            totals: N for each candidate that every rank has.

        Raises:
            AmbiguousTargets: On every rank, if the candidates give other weights.
        """
        if self.settled is not None:
            self.check(live.counts)
            return self.settled
        names = sorted(totals)
        known = live.notes.of(KnownTargets).name
        candidates = likely(names)
        flags = [*(name == known for name in names), counts_agree(live, candidates)]
        *is_known, all_equal = self._agree(torch.tensor(flags, dtype=torch.int64)).tolist()
        self.settled = next((name for name, flag in zip(names, is_known, strict=True) if flag), None)
        if self.settled is not None:
            return self.settled
        if not candidates:
            raise _uncountable(live)
        if not all_equal and not self._guesses:
            raise ambiguous(candidates)
        return candidates[0]

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


def ambiguous(names: list[str]) -> AmbiguousTargets:
    """For a step that was not tried, whose loss may be a mean over any of several tensors."""
    return AmbiguousTargets(
        f"a loss that could be a mean over any of {names}, which have other numbers of targets",
        "to know which of them the loss is a mean over, since the step was not tried",
        f"set targets={names[0]!r} (or another of them) in the strategy, or loss_weighting='none' if the loss is no "
        "mean over tokens",
    )
