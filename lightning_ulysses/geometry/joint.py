"""How a submodule runs in which tokens meet outside of attention: on the joined sequence, or with a halo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_ulysses.geometry.layout import SequenceLayout

# Stands for an output that is one tensor and therefore has no index or key.
ONLY_OUTPUT = ""
# Where a caller pads a sequence before it is convolved, with the part of the padding that is before it.
PADDED = {"before": 1.0, "both": 0.5, "after": 0.0}


@dataclass(frozen=True)
class Joined:
    """Every rank runs the submodule on the whole sequence, and keeps its slice of what it returns.

    Attributes:
        inputs: Inputs that carry the sequence, by parameter name or position, with their dimension.
        outputs: Outputs that do, by index or key. None: each tensor that is as long as the sequence along one of the
            dimensions in ``inputs``, or else along exactly one.
    """

    inputs: Mapping[str, int | None]
    outputs: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Halo:
    """The submodule gets the tokens beside a slice that it reaches; a convolution or pooling of stride 1.

    Attributes:
        dim: The dimension of the sequence in its input.
        padded: Where the caller has put zeros, if the input is longer than a slice: a key of `PADDED`.
    """

    dim: int
    padded: str = "before"


Joint = Joined | Halo


@dataclass(frozen=True)
class Reach:
    """The tokens on which one output token depends, beside its own.

    Attributes:
        before: How many before it.
        after: How many behind it.
    """

    before: int
    after: int

    def spans(self, layout: SequenceLayout) -> tuple[tuple[int, int], ...]:
        """For each rank the tokens (begin, end) that its slice depends on; none for a slice of padding alone."""
        end, found = layout.real_len, []
        for span in layout.spans:
            begin, stop = min(span.start, end), min(span.stop, end)
            is_empty = begin == stop
            found.append((begin, begin) if is_empty else (max(0, begin - self.before), min(end, stop + self.after)))
        return tuple(found)
