"""Parts of a step that run a part at a time, along the tokens or the heads, so that they take less memory."""

from __future__ import annotations

from lightning_ulysses.memory.checkpoint import neighbours
from lightning_ulysses.memory.cross_entropy import tiled_cross_entropy
from lightning_ulysses.memory.deferred_logits import realized
from lightning_ulysses.memory.install_parts import install, parts, units

__all__ = ["install", "neighbours", "parts", "realized", "tiled_cross_entropy", "units"]
