"""Evidence of which tensor holds the targets: the cross entropies that a step computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class TargetEvidence:
    """One loss that a step computes: its targets and result, or only the name of its targets.

    Attributes:
        target: The argument ``target``.
        ignore_index: The label that counts as no target.
        is_mean: Whether ``value`` is a mean over the targets. Otherwise it is a sum, or has one entry for each target.
        name: The name of the tensor with the targets, if it is known for certain.
        value: The result.
    """

    target: Tensor | None = None
    ignore_index: int = -100
    is_mean: bool = True
    name: str | None = None
    value: Tensor | None = None


@dataclass
class LossEvidence:
    """A note on a batch.

    Attributes:
        found: The losses recorded so far. Cross entropies are recorded only while `LossWatch.is_open`.
        has_whole_part: Whether some part of the loss is computed over the whole batch on every rank, such as the
            auxiliary loss of a router.
    """

    found: list[TargetEvidence] = field(default_factory=list)
    has_whole_part: bool = False


@dataclass
class LossWatch:
    """A note on a run.

    Attributes:
        is_open: Whether cross entropies are recorded, since the tensor with the targets is not settled yet.
    """

    is_open: bool = False
