"""What regions remember."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_ulysses.context import LocalBatch
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.notes import StorageTable


@dataclass
class RegionTally:
    """A note about a run: regions begun so far."""

    begun: int = 0


@dataclass
class RegionSizes:
    """A note about a batch: the geometry of the last region that was split in its step."""

    layout: SequenceLayout | None = None


@dataclass
class Beside:
    """A note about a region: tensors that its first submodule got beside those that were split, such as a text."""

    tensors: StorageTable[Any] = field(default_factory=StorageTable)


def split_layout(batch: LocalBatch) -> SequenceLayout:
    """The geometry of what was split, where the batch itself says nothing of it."""
    measured = batch.notes.of(RegionSizes).layout
    is_unknown = batch.layout.seq_len == batch.layout.sp_size
    return measured if measured is not None and is_unknown else batch.layout
