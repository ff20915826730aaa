"""The exact loss of an evaluation, even if it is not known yet which tensor holds the targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ulysses.context import LocalBatch
from lightning_ulysses.loss.targets import KnownTargets, ambiguous, counts_agree, likely
from lightning_ulysses.loss.token_mean import TokenMean


@dataclass
class _Word:
    """A rank's message about one dataloader: the tensors that all its batches had, if there was any."""

    names: frozenset[str] | None
    known: str | None
    all_equal: bool


class EvaluationLoss:
    """The mean over the targets of one evaluation dataloader.

    Ranks may get different numbers of batches, so nothing is exchanged before the end. Until then, one mean is kept for
    each tensor that may hold the targets.

    Args:
        tried: Returns the tensors that hold the targets, the likeliest first, as far as training or a trial has shown.
        by_targets: Whether batches are weighted by their number of targets. Otherwise all have the same weight.
        device: The device of the losses.
        times: How often a rank's loss counts, where batches are not weighted by targets.
    """

    def __init__(self, tried: Callable[[], list[str]], by_targets: bool, device: torch.device, times: int = 1) -> None:
        self._tried = tried
        self._by_targets = by_targets
        self._times = 1 if by_targets else times
        self._device = device
        self._means: dict[str, TokenMean] | None = None
        self._known: str | None = None
        self._all_equal = True

    def add(self, loss: Tensor, live: LocalBatch) -> None:
        """Adds the loss of one batch: the mean over the targets of this rank."""
        # Without weighting by targets, each batch counts as one target under an empty name.
        counts = live.counts if self._by_targets else {"": 1.0}
        if self._means is None:
            self._means = {name: TokenMean().to(self._device) for name in counts}
        # A tensor that one batch lacks cannot hold the targets of all.
        self._means = {name: mean for name, mean in self._means.items() if name in counts}
        for name, mean in self._means.items():
            mean.update(loss * self._times, counts[name])
        self._known = live.notes.of(KnownTargets).name
        self._all_equal &= counts_agree(live, likely(live.counts))

    def word(self) -> _Word:
        """This rank's message to the other ranks."""
        names = None if self._means is None else frozenset(self._means)
        return _Word(names, self._known, self._all_equal)

    def compute(self, words: Sequence[_Word]) -> Tensor | None:
        """The mean over all ranks; a collective.

        Args:
            words: The messages of all ranks.

        Returns:
            () float32, or None if no rank has added anything.

        Raises:
            UlyssesError: If it cannot be told which tensor holds the targets.
        """
        given = [word for word in words if word.names is not None]
        if not given:
            return None
        names = frozenset.intersection(*(word.names for word in given if word.names is not None))
        wanted = self._wanted(names, given) if self._by_targets else ""
        # `compute` is a collective of torchmetrics: a rank without a batch takes part with an empty mean.
        return (self._means or {}).get(wanted, TokenMean().to(self._device)).compute()

    def _wanted(self, names: frozenset[str], words: Sequence[_Word]) -> str:
        known = next((word.known for word in words), None)
        tried = [name for name in (*self._tried(), known) if name in names]
        candidates = tried or likely(names)
        if not candidates or not (tried or all(word.all_equal for word in words)):
            raise ambiguous(sorted(names))
        return str(candidates[0])


def compute_all(losses: Sequence[EvaluationLoss]) -> list[Tensor | None]:
    """`EvaluationLoss.compute` for every dataloader, after one exchange of all messages."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [loss.word() for loss in losses])
    return [loss.compute([words[index] for words in everyone]) for index, loss in enumerate(losses)]
