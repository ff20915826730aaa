"""The exact loss of an evaluation, even if it is not known yet which tensor holds the targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ulysses.context import LocalBatch
from lightning_ulysses.geometry.batch_keys import KEPT
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.loss.targets import choose_names, counts_agree, score_names
from lightning_ulysses.loss.token_mean import TokenMean

# Batches whose cross entropies are compared with the targets. Each comparison waits for the device.
_LOOKED_AT = 3


@dataclass
class _Word:
    """A rank's message about one dataloader: a score for each tensor that all its batches had."""

    scores: dict[str, int] | None
    all_equal: bool


class EvaluationLoss:
    """The mean over the targets of one evaluation dataloader.

    Ranks may get different numbers of batches, so nothing is exchanged before the end. Until then, one mean is kept for
    each tensor that may hold the targets.

    Args:
        name: The tensor with the targets, if training has settled it.
        by_targets: Whether batches are weighted by their number of targets. Otherwise all have the same weight.
        device: The device of the losses.
        times: How often a rank's loss counts, where batches are not weighted by targets.
    """

    def __init__(self, name: str | None, by_targets: bool, device: torch.device, times: int = 1) -> None:
        self._name = name
        self._by_targets = by_targets
        self._times = 1 if by_targets else times
        self._device = device
        self._means: dict[str, TokenMean] | None = None
        self._scores: dict[str, int] = {}
        self._all_equal = True
        self._first: LocalBatch | None = None
        self._batches = 0

    def add(self, loss: Tensor, live: LocalBatch) -> None:
        """Adds the loss of one batch: the mean over the targets of this rank."""
        # Without weighting by targets, each batch counts as one target under an empty name.
        counts = live.counts if self._by_targets else {"": 1.0}
        if self._name is not None and self._name in counts:
            counts = {self._name: counts[self._name]}
        if self._means is None:
            self._means = {name: TokenMean().to(self._device) for name in counts}
            self._first = live
        # A tensor that one batch lacks cannot hold the targets of all.
        self._means = {name: mean for name, mean in self._means.items() if name in counts}
        for name, mean in self._means.items():
            mean.update(loss * self._times, counts[name])
        if self._name is None and self._by_targets and self._batches < _LOOKED_AT:
            for name, score in score_names(live, [name for name in counts if not name.endswith(KEPT)]).items():
                # A name must explain every batch, so its worst score counts.
                self._scores[name] = min(score, self._scores.get(name, score))
            self._all_equal &= counts_agree(live, live.counts)
        self._batches += 1

    def word(self) -> _Word:
        """This rank's message to the other ranks."""
        if self._means is None:
            return _Word(None, True)
        return _Word({name: self._scores.get(name, 0) for name in self._means}, self._all_equal)

    def compute(self, words: Sequence[_Word]) -> Tensor | None:
        """The mean over all ranks; a collective.

        Args:
            words: The messages of all ranks.

        Returns:
            () float32, or None if no rank has added anything.

        Raises:
            UlyssesError: If it cannot be told which tensor holds the targets.
        """
        known = [word.scores for word in words if word.scores is not None]
        if not known:
            return None
        names = set.intersection(*(set(scores) for scores in known))
        scores = {name: min(each[name] for each in known) for name in names if not name.endswith(KEPT)}
        wanted = self._name if self._by_targets else ""
        if wanted is None or wanted not in names:
            # `live` is only used for an error message. A rank without a batch passes an empty one.
            live = self._first or LocalBatch(SequenceLayout(1, 1))
            wanted = choose_names(scores, all(word.all_equal for word in words), live)[0][0]
        # `compute` is a collective of torchmetrics: a rank without a batch takes part with an empty mean.
        return (self._means or {}).get(wanted, TokenMean().to(self._device)).compute()


def compute_all(losses: Sequence[EvaluationLoss]) -> list[Tensor | None]:
    """`EvaluationLoss.compute` for every dataloader, after one exchange of all messages."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [loss.word() for loss in losses])
    return [loss.compute([words[index] for words in everyone]) for index, loss in enumerate(losses)]
