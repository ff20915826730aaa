"""Attention on a split sequence: the dispatch of every call, the exchange, and the computation."""

from __future__ import annotations

from lightning_ulysses.attention.attend import attend
from lightning_ulysses.attention.function import ulysses_attention
from lightning_ulysses.geometry.mask_spec import MaskSpec
from lightning_ulysses.patching.handle import Handle

__all__ = ["Handle", "MaskSpec", "attend", "ulysses_attention"]
