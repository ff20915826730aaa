"""Tokens of a batch in all forms in which a step is tried on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_ulysses.batch.excerpt import (
    excerpts,
    halves,
    middle,
    most_filled,
    most_uneven,
    parted_targets,
    with_fewer_targets,
)
from lightning_ulysses.batch.pipeline import fill_mask, local_batch
from lightning_ulysses.batch.whole import WholeBatch, read_batch
from lightning_ulysses.context import LocalBatch
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.batch_keys import BatchRules
from lightning_ulysses.geometry.shares import even_shares
from lightning_ulysses.loss.targets import likeliest_first

Inputs = tuple[Any, LocalBatch]

# Tokens of a batch that one process may run whole.
_SMALL = 16384


@dataclass(frozen=True)
class Sample:
    """Some tokens of a batch.

    Attributes:
        whole: All of them, for one process.
        part: This rank's slice; None of a batch that cannot be cut.
        planned: Makes all of them anew, for a model that is split inside.
    """

    whole: Inputs
    part: Inputs | None
    planned: Callable[[], Inputs]


class Samples:
    """Makes samples of one batch.

    Args:
        batch: The batch.
        rules: How it is read if every rank gets a slice.
        whole_rules: How it is read if every rank gets all of it.
        mesh: Sizes and groups.
        device: Where the module is.
        move: Moves a batch there.
        module: The user's, whose sizes no excerpt should have.
    """

    def __init__(
        self,
        batch: WholeBatch,
        rules: BatchRules,
        whole_rules: BatchRules,
        mesh: SequenceMesh,
        device: torch.device,
        move: Callable[[Any], Any],
        module: nn.Module,
    ) -> None:
        self._batch = batch
        self._rules = whole_rules if batch.keeps_all else rules
        self._whole_rules = whole_rules
        # What is split inside gets whole batches.
        self._row_rules = whole_rules if mesh.sp_size > 1 else self._rules
        self._mesh = mesh
        self._device = device
        self._move = move
        # A length that something else has could not be told from it.
        tensors = [*module.parameters(), *(leaf for leaf in tree_leaves(batch.template) if is_tensor(leaf))]
        self._sizes = {size for tensor in tensors for size in tensor.shape}
        self._best = most_filled(self._excerpts(), self._rules, mesh.sp_size)
        self._uneven: list[Any] | None = None
        self._needs_all = False

    def _excerpts(self, *, short_first: bool = False) -> Any:
        return excerpts(self._batch, self._rules, self._mesh.sp_size, self._sizes, short_first=short_first)

    @property
    def _is_small(self) -> bool:
        return self._batch.rows * self._batch.layout.seq_len <= _SMALL

    @property
    def has_more(self) -> bool:
        """Whether there is a sample of the whole batch, for a step that needs all of it."""
        return self._is_small and self._best is not self._batch.template

    @property
    def has_targets(self) -> bool:
        """Whether any tensor of the whole batch holds some; also where there is none that could."""
        counts = [count for name, count in self._batch.counts_of_group().items() if name != "tokens"]
        return any(counts) or not counts

    @property
    def likeliest(self) -> str | None:
        """The tensor whose targets most often weight a loss; None if there is no tensor with targets."""
        return next((name for name in likeliest_first(self._batch.counts) if name != "tokens"), None)

    def first(self) -> Sample:
        """An excerpt with targets in as many rows and slices as possible."""
        return self._sample(self._best)

    def all(self) -> Sample:
        """The whole batch: classes of a step may be places in the sequence."""
        self._best, self._needs_all = self._batch.template, True
        return self.first()

    def fewer(self, name: str) -> Sample | None:
        """The same tokens, with fewer targets of a tensor in the first slice; None if it has none to spare."""
        share = even_shares(read_batch(self._best, self._rules, 1).layout.seq_len, self._mesh.sp_size)[0]
        short = with_fewer_targets(self._best, self._rules, name, share)
        return None if short is None else self._sample(short)

    def by_rows(self, name: str | None = None) -> list[Inputs]:
        """Some rows, or documents of a row, and their two halves; nothing if the batch has no such parts.

        Nothing either where some rows are no batch that can be read.

        Args:
            name: A tensor that is to have fewer targets in the first half.
        """
        try:
            return self._by_rows(name)
        except UlyssesError:
            return []

    def _by_rows(self, name: str | None) -> list[Inputs]:
        rules = self._row_rules
        if self._uneven is None:
            # A step that needs the whole batch fails on an excerpt. Short rows tell as much unless they lack targets.
            short = [] if self._needs_all else self._excerpts(short_first=True)
            self._uneven = most_uneven([*short, *([self._batch.template] if self._is_small else [])], rules)
        parts = self._uneven
        if parts and name is not None:
            whole = read_batch(parts[0], rules, 1)
            edge = whole.layout.seq_len if whole.rows > 1 else middle(whole) or 0
            fewer = with_fewer_targets(parts[0], rules, name, edge)
            parts = [] if fewer is None else [fewer, *halves(fewer, rules)]
        return [self._read(rows, rules, 1, stand_in=False) for rows in parts]

    def by_targets(self) -> Iterator[list[Inputs]]:
        """For each tensor that may hold the targets the sample, and its two parts; see `parted_targets`."""
        rules = self._row_rules
        for name in self._batch.counts:
            parts = parted_targets(self._best, rules, name)
            if parts:
                yield [self._read(part, rules, 1, stand_in=False) for part in parts]

    def _sample(self, short: Any) -> Sample:
        part, size = None, self._mesh.sp_size
        if not self._batch.keeps_all:
            part = self._read(short, self._rules, size, stand_in=True)
            for name in part[1].counts:
                fill_mask(part[1], name)
        whole = self._read(short, self._rules, 1, stand_in=False)
        return Sample(whole, part, lambda: self._read(short, self._whole_rules, size, stand_in=True))

    def _read(self, batch: Any, rules: BatchRules, size: int, *, stand_in: bool) -> Inputs:
        # A step may write to its batch: each run has tensors of its own, as has the real step.
        copied = tree_map(lambda leaf: leaf.clone() if is_tensor(leaf) else leaf, batch)
        read = read_batch(copied, rules, size)
        return local_batch(read, self._mesh.sp_rank % size, self._move, self._device, stand_in=stand_in)


def is_tensor(leaf: Any) -> bool:
    """Whether a leaf of a batch is a tensor."""
    return isinstance(leaf, Tensor)
