"""What a step's losses show of its targets, noted while it is open which tensor holds them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class TargetEvidence:
    """What a cross entropy of the step was computed on, and its result.

    Attributes:
        target: The targets.
        ignore_index: The one that counts as none.
        is_mean: Whether it is a mean over them; else ``value`` is their sum, or has one entry for each.
        name: Of the tensor with the targets, where that is known for certain.
        value: The result.
    """

    target: Tensor | None = None
    ignore_index: int = -100
    is_mean: bool = True
    name: str | None = None
    value: Tensor | None = None


@dataclass
class LossEvidence:
    """A note about a batch.

    Attributes:
        found: The losses computed so far, as far as they are noted.
        has_whole_part: Whether a part of the loss is that of the whole batch on every rank, such as a router's.
    """

    found: list[TargetEvidence] = field(default_factory=list)
    has_whole_part: bool = False


@dataclass
class LossWatch:
    """A note about a run.

    Attributes:
        is_open: Whether it is open which tensor holds the targets, so that cross entropies are noted.
    """

    is_open: bool = False
