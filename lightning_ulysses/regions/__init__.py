"""Splits a model at its first block and joins it at its last, as a plan says, instead of cutting the batch."""

from __future__ import annotations

from lightning_ulysses.regions.hooks import install

__all__ = ["install"]
