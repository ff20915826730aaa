"""Runs the user's step on an excerpt, whole and on slices, and refuses a loss that slices cannot add up to."""

from __future__ import annotations

from lightning_ulysses.checks.trial.messages import advice, explained, refusal, warn_unchecked
from lightning_ulysses.checks.trial.trial import StepTrial

__all__ = ["StepTrial", "advice", "explained", "refusal", "warn_unchecked"]
