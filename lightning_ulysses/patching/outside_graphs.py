"""Keeps collectives out of the graphs of ``torch.compile``.

Each rank compiles by itself, for a slice of its own length. A compiled backward may run its collectives in a different
order on each rank, and then the ranks deadlock. A function that is kept out breaks the graph: one graph ends, the
function runs eagerly, and the next graph begins after it. Autograd calls its backward between the backwards of the two
graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])


def eager(function: F) -> F:
    """Makes ``torch.compile`` run ``function`` and everything it calls eagerly; ``fullgraph=True`` fails on it."""
    disabled: F = torch.compiler.disable(function, reason="lightning_ulysses exchanges slices between processes here")
    return disabled
