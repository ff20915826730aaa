"""Runs the user's step on an excerpt, whole and split, and so finds where the sequence can be split exactly."""

from __future__ import annotations

from lightning_ulysses.checks.trial.choice import SplitChoice
from lightning_ulysses.checks.trial.messages import explained
from lightning_ulysses.checks.trial.sandbox import aside, state_kept

__all__ = ["SplitChoice", "aside", "explained", "state_kept"]
