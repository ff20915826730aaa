"""Runs a LightningModule on several processes and on one, and compares the optimizer step."""

from __future__ import annotations

from lightning_ulysses.testing.processes import ProcessPool, RemoteError
from lightning_ulysses.testing.runs import (
    QUIET,
    Difference,
    SplitRun,
    StepRecorder,
    StepResult,
    compare,
    fit_rank,
    fit_single,
    fit_split,
    snapshot,
    split_loader,
    split_trainer,
)

__all__ = [
    "QUIET",
    "Difference",
    "ProcessPool",
    "RemoteError",
    "SplitRun",
    "StepRecorder",
    "StepResult",
    "compare",
    "fit_rank",
    "fit_single",
    "fit_split",
    "snapshot",
    "split_loader",
    "split_trainer",
]
