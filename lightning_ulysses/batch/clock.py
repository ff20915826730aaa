"""Where a run stands, told by the program that drives it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """One moment of a run.

    Args:
        stage: The name of the loop, such as ``"train"``. Random streams of different stages differ.
        is_training: Whether a backward follows the step.
        epoch: Epochs finished so far.
        batch: Training batches used so far, over all epochs.
        step: Optimizer steps taken so far.
        accumulate: Micro-batches of an optimizer step.
        is_boundary: Whether the optimizer steps after this micro-batch.
        is_automatic: Whether the program that drives the run steps the optimizer, and not the module itself.
    """

    stage: str = "train"
    is_training: bool = True
    epoch: int = 0
    batch: int = 0
    step: int = 0
    accumulate: int = 1
    is_boundary: bool = True
    is_automatic: bool = True
