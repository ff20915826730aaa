"""Has activation checkpointing repeat a forward in the place of the step where it was first run.

The backward pass does not say whether what it repeats came before a split, behind it, or behind the join.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch.utils.checkpoint
from torch import nn

from lightning_ulysses.context import SequenceContext
from lightning_ulysses.patching.early_bound import rebind
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.upstream.deepspeed import checkpointing


class _Placed:
    """A function that is run once, and then again as if at the same place."""

    def __init__(self, context: SequenceContext, function: Callable[..., Any]) -> None:
        self._context = context
        self._function = function
        self._place = context.place
        self._is_first = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_first:
            # What a split or a join inside it begins or ends holds behind it as well.
            self._is_first = False
            return self._function(*args, **kwargs)
        context = self._context
        # What was computed without a compiler saved other tensors than it would with one.
        with context.at(self._place), context.uncompiled() if self._place.is_uncompiled else nullcontext():
            return self._function(*args, **kwargs)


def install(context: SequenceContext, root: nn.Module, handle: Handle) -> None:
    """Guards the checkpoints of torch and of DeepSpeed, also where they were bound early.

    Args:
        context: Where the step stands.
        root: The user's LightningModule.
        handle: Undoes it.
    """

    def guarded(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return original(_Placed(context, function), *args, **kwargs)

        return checkpoint

    owners: list[tuple[Any, str]] = [(torch.utils.checkpoint, "checkpoint")]
    of_deepspeed = checkpointing()
    if of_deepspeed is not None:
        owners += [(of_deepspeed, "checkpoint"), (of_deepspeed, "non_reentrant_checkpoint")]
    for owner, name in owners:
        original = getattr(owner, name)
        checkpoint = guarded(original)
        handle.patch(owner, name, checkpoint)
        rebind(handle, root, original, checkpoint)
