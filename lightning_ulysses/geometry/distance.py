"""How far numbers are from what they should be."""

from __future__ import annotations

import math
from collections.abc import Iterable


def largest(errors: Iterable[float]) -> float:
    """The largest error; infinite if one is not a number, which `max` passes over, or if there is none."""
    found = list(errors)
    return max(found) if found and not any(math.isnan(error) for error in found) else math.inf
