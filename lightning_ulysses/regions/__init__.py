"""Splits the sequence inside the model and joins it again, as a plan says, instead of cutting the batch."""

from __future__ import annotations

from lightning_ulysses.regions.hooks import install
from lightning_ulysses.regions.joints import joint_modules

__all__ = ["install", "joint_modules"]
