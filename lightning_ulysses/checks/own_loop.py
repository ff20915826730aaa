"""Checks of a loop that is the user's own, where it calls Fabric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ulysses.checks.optimizer import clipping_error
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.split_plan import SequencePlan


class Window:
    """The accumulation window of a loop: which backwards have been called since the last step.

    Attributes:
        is_boundary: Whether the optimizer steps after the backwards that are called now.
    """

    def __init__(self) -> None:
        self.is_boundary = True
        self._pending: bool | None = None

    def backward(self) -> None:
        """Notes a backward.

        Raises:
            UlyssesError: If the one before it was said to be the last one of its step.
        """
        if self._pending:
            raise UlyssesError(
                "a second backward before optimizer.step(), where the first one was the last of its step",
                "to know which backward of a step is the last one: ZeRO adds up gradients over ranks in it",
                "run all micro-batches but the last inside fabric.no_backward_sync(model, enabled=is_accumulating), or "
                "call optimizer.zero_grad() to drop the gradients so far",
            )
        self._pending = self.is_boundary

    def step(self, has_closure: bool) -> None:
        """Notes a step of the optimizer.

        Raises:
            UlyssesError: For a step with a closure, or one after a backward that was not the last of its step.
        """
        if has_closure:
            raise UlyssesError(
                "optimizer.step(closure)",
                "optimizer.step() after fabric.backward(loss): the engine of DeepSpeed takes no closure",
                "call the closure's lines in the loop, and step without it",
            )
        if self._pending is None:
            raise UlyssesError(
                "optimizer.step() without a backward since the last step",
                "fabric.backward(loss) before each step",
                "call fabric.backward(loss), not loss.backward()",
            )
        if not self._pending:
            raise UlyssesError(
                "optimizer.step() after a backward inside fabric.no_backward_sync(model)",
                "the last backward of a step outside of it, since gradients are added up over ranks there",
                "set enabled=False in no_backward_sync for the last micro-batch of each step",
            )
        self.clear()

    def clear(self) -> None:
        """Notes that there are no gradients any more."""
        self._pending = None

    @property
    def is_complete(self) -> bool:
        """Whether the gradients of a step have been added up over ranks."""
        return bool(self._pending)


def check_plan(plan: SequencePlan | None, given: Any) -> None:
    """Refuses a plan after which each rank has a loss of its slice.

    Raises:
        UlyssesError: With the plan.
    """
    if plan is not None and not plan.join:
        raise UlyssesError(
            f"plan={given!r}, which joins nothing",
            "a plan with join, after which the loop has the loss of whole sequences",
            "name the output under join, with 'divided': True to keep slices of it, or leave plan out",
        )


def check_setup(former: Any, optimizers: Sequence[Any] | None) -> None:
    """Refuses several modules, or several optimizers.

    Args:
        former: The module that was set up before, or None.
        optimizers: Those of ``fabric.setup``; None for a module alone.

    Raises:
        UlyssesError: With what to do about it.
    """
    if former is not None:
        raise UlyssesError(
            f"a second module in fabric.setup, after {type(former).__name__}",
            "one module, whose calls are split",
            "put both into one nn.Module and freeze what is not trained, or call fabric.strategy.close() first",
        )
    if optimizers is not None and len(optimizers) != 1:
        raise UlyssesError(
            f"{len(optimizers)} optimizers in fabric.setup",
            "one optimizer: ZeRO shards the state of a single one",
            "pass one optimizer; parameters with settings of their own go into groups of it",
        )


def check_uncompiled(name: str) -> None:
    """Refuses a call inside a compiled graph, where a few tokens could not be tried first."""
    if torch.compiler.is_compiling():
        raise UlyssesError(
            f"torch.compile({name}(...)) before fabric.setup",
            "a module that is split at its blocks, each of which may be compiled",
            "compile the blocks in place, such as `for block in model.blocks: block.compile()`",
        )


def check_clipping(norm_type: float, window: Window) -> None:
    """Refuses norms that DeepSpeed does not clip by, and clipping before gradients are complete.

    Raises:
        UlyssesError: With the norm, or where to clip.
    """
    if float(norm_type) != 2.0:
        raise UlyssesError(
            f"clip_gradients(norm_type={norm_type!r})", "the 2-norm, the only one that DeepSpeed clips by", "drop it"
        )
    if not window.is_complete:
        raise UlyssesError(
            "clip_gradients before the last backward of a step",
            "gradients that are added up over ranks",
            "clip right before optimizer.step(), after the backward outside of fabric.no_backward_sync(model)",
        )


def check_norm(norm: Tensor) -> None:
    """Refuses a norm that is infinite or NaN, as torch does."""
    # DeepSpeed has -1 in its place.
    if not bool(torch.isfinite(norm)) or float(norm) < 0:
        raise UlyssesError(
            "gradients whose norm is infinite or NaN",
            "finite ones",
            "look at the batch and the learning rate, or pass error_if_nonfinite=False to clip_gradients: DeepSpeed "
            "then skips the step in half precision",
        )


def clips_values(value: float) -> UlyssesError:
    """For ``clip_gradients(clip_val=...)``."""
    error = clipping_error("value")
    return UlyssesError(f"clip_gradients(clip_val={value!r})", error.expected, "pass max_norm in place of clip_val")
