"""Places of a backward that all ranks of a group reach together: the exchanges of attention, and joins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class BackwardTurns:
    """A note on a run: what is called in each backward before ranks exchange gradients of slices.

    Between two exchanges, ranks may do the same in different orders. A collective in between could wait for a rank that
    waits in the next exchange; here it cannot.

    Attributes:
        calls: What is called, on every rank.
    """

    calls: list[Callable[[], None]] = field(default_factory=list)

    def before(self, out: Tensor) -> None:
        """Has the backward of ``out``, the result of an exchange, begin with the calls."""
        if self.calls and out.requires_grad:
            out.register_hook(self._take)

    def _take(self, grad: Tensor) -> None:
        for call in self.calls:
            call()
