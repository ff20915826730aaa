"""Compares a LightningModule on split sequences with the same module in one process, and finds the difference."""

from __future__ import annotations

from lightning_ulysses.verification.parity import verify_parity
from lightning_ulysses.verification.report import ParityReport

__all__ = ["ParityReport", "verify_parity"]
