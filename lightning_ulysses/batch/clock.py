"""The progress of a run, as reported by the program that drives it, such as Lightning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Clock:
    """The state of all counters at one moment of a run.

    Args:
        stage: The name of the loop, such as ``"train"``. Each stage has random numbers of its own.
        is_training: Whether a backward follows the step.
        epoch: Number of epochs finished.
        batch: Number of training batches used, over all epochs.
        step: Number of optimizer steps taken.
        accumulate: Micro-batches of an optimizer step.
        is_boundary: Whether the optimizer steps after this micro-batch.
        is_last: Whether the training batch that was used last is the last one of its epoch.
        is_automatic: Whether the program that drives the run steps the optimizer. False if the module does it itself.
        is_counted: Whether ``batch`` counts the steps of this stage although no training is known of.
    """

    stage: str = "train"
    is_training: bool = True
    epoch: int = 0
    batch: int = 0
    step: int = 0
    accumulate: int = 1
    is_boundary: bool = True
    is_last: bool = False
    is_automatic: bool = True
    is_counted: bool = False

    @property
    def kind(self) -> str:
        """The stage whose step runs: a sanity check runs that of validation."""
        return "validate" if self.stage == "sanity_check" else self.stage


def read_clock(module: Any, trainer: Any) -> Clock:
    """The progress of a run of Lightning.

    Args:
        module: A LightningModule.
        trainer: Its Trainer.
    """
    return Clock(
        stage=trainer.state.stage.value if trainer.state.stage is not None else "",
        is_training=trainer.training,
        epoch=trainer.current_epoch,
        batch=trainer.fit_loop.total_batch_idx,
        step=trainer.global_step,
        accumulate=trainer.accumulate_grad_batches if module.automatic_optimization else 1,
        is_automatic=module.automatic_optimization,
    )
