"""Parts of a step that run tile by tile along the tokens, so that their memory does not grow with the sequence."""

from __future__ import annotations

from lightning_ulysses.memory.deferred_logits import realized
from lightning_ulysses.memory.install_parts import install, parts, units

__all__ = ["install", "parts", "realized", "units"]
