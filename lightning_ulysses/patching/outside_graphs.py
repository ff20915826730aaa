"""Keeps collectives out of the graphs of ``torch.compile``.

Ranks compile by themselves and hold slices of different lengths; a compiled backward may run its collectives in an
order of its own, and then ranks wait for each other forever. A function that is kept out ends one graph, runs as it is,
and the next graph begins behind it; autograd calls its backward between those of the graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])


def eager(function: F) -> F:
    """Has ``torch.compile`` leave ``function``, and all that it calls, as it is; ``fullgraph=True`` fails on it."""
    disabled: F = torch.compiler.disable(function, reason="lightning_ulysses exchanges slices between processes here")
    return disabled
