"""The notes of regions on a run and on a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_ulysses.context import LocalBatch
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.notes import StorageTable


@dataclass
class RegionTally:
    """A note on a run: the number of regions begun so far."""

    begun: int = 0


@dataclass
class RegionSizes:
    """A note on a batch: the layout of the last region in its step."""

    layout: SequenceLayout | None = None


@dataclass
class Beside:
    """A note on a region: the inputs of its first submodule that were not split, such as a text."""

    tensors: StorageTable[Any] = field(default_factory=StorageTable)


def split_layout(batch: LocalBatch) -> SequenceLayout:
    """The layout of the sequence that was split in the step of ``batch``."""
    measured = batch.notes.of(RegionSizes).layout
    # A batch in which no sequence was found has S = P, see `read_batch`. Then the region tells.
    is_unknown = batch.layout.seq_len == batch.layout.sp_size
    return measured if measured is not None and is_unknown else batch.layout
