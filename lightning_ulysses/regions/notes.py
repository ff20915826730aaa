"""The notes of regions on a run and on a batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_ulysses.context import LocalBatch
from lightning_ulysses.geometry.layout import SequenceLayout


@dataclass
class RegionTally:
    """A note on a run: the number of regions begun so far."""

    begun: int = 0


@dataclass
class JointTally:
    """A note on a run: the number of calls of submodules so far that ran on more than a slice."""

    calls: int = 0


@dataclass
class RegionSizes:
    """A note on a batch.

    Attributes:
        layout: Of the last region in its step.
        layouts: Of all regions in it.
    """

    layout: SequenceLayout | None = None
    layouts: list[SequenceLayout] = field(default_factory=list)


def split_layout(batch: LocalBatch) -> SequenceLayout:
    """The layout of the sequence that was split in the step of ``batch``."""
    measured = batch.notes.of(RegionSizes).layout
    # A batch in which no sequence was found has S = P, see `read_batch`. Then the region tells.
    is_unknown = batch.layout.seq_len == batch.layout.sp_size
    return measured if measured is not None and is_unknown else batch.layout
