"""Runs a model on a few tokens (the trial) to find out whether it can be split along the sequence."""

from __future__ import annotations

from lightning_ulysses.checks.probing.probe import ModelProbe

__all__ = ["ModelProbe"]
