"""Checks of what a step has done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_ulysses.context import SequenceState
from lightning_ulysses.errors import UlyssesError

if TYPE_CHECKING:
    import lightning.pytorch as pl


def check_intercepted(state: SequenceState, step: str, module: str, suspensions: int) -> None:
    """Refuses a model none of whose attention was seen in a first step, since it would attend within slices only.

    Args:
        state: The strategy's state.
        step: The step that ran.
        module: The user's class.
        suspensions: `SequenceState.suspensions` before the step; one that only generates is unsharded on purpose.

    Raises:
        UlyssesError: If no attention call of any step so far was intercepted, or a plan did not take place.
    """
    if state.is_planned and not state.splits and state.suspensions == suspensions:
        raise UlyssesError(
            f"a {step} of {module} that reached none of the submodules that the plan splits",
            "a step that calls at least one of them",
            "name a submodule under split that the step calls (its forward by way of the module itself, not .forward)",
        )
    if state.is_joined and state.place.region is not None:
        raise UlyssesError(
            f"a {step} of {module} that ended before it reached a submodule that the plan joins",
            "a call of one behind each split",
            "name a submodule under join that the step calls, or drop join and name the model's inputs under whole",
        )
    if state.mesh.sp_size > 1 and not state.attention_calls and state.suspensions == suspensions:
        raise UlyssesError(
            f"a {step} of {module} without a single attention call intercepted",
            "calls of torch.nn.functional.scaled_dot_product_attention, of transformers' attention functions, or of "
            "lightning_ulysses.ulysses_attention; anything else would stay within this rank's slice",
            "call torch.nn.functional.scaled_dot_product_attention by its full name, or set sp_size=1",
        )


def check_output(output: Any, module: pl.LightningModule) -> None:
    """Refuses a training step that skips its batch, whose targets the optimizer step has already counted.

    Raises:
        UlyssesError: If automatic optimisation gets no loss.
    """
    if output is None and module.automatic_optimization:
        raise UlyssesError(
            f"None from {type(module).__name__}.training_step",
            "a loss for every batch, since a step's targets are counted ahead over all micro-batches and ranks",
            "leave unwanted batches out in the dataset, or give their labels the ignore_index",
        )
