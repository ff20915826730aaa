"""Code written for a whole sequence runs on slices of it, and nothing is joined that need not be."""

from __future__ import annotations

# The rules register themselves.
from lightning_ulysses.divided import along, losses, pointwise, shapes
from lightning_ulysses.divided.tensor import Divided, Division, aware, joined, touched

__all__ = ["Divided", "Division", "along", "aware", "joined", "losses", "pointwise", "shapes", "touched"]
