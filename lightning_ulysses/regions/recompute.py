"""Makes activation checkpointing recompute a forward at the same place of the step as at first.

The backward pass does not tell whether the recomputed layers come before the split, inside the region, or after the
join.
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
    """A checkpointed function that remembers the place of its first call and restores it for later calls."""

    def __init__(self, context: SequenceContext, function: Callable[..., Any]) -> None:
        self._context = context
        self._function = function
        self._place = context.place
        self._is_first = True

    # The first call is the forward, every further one a recomputation in the backward.
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_first:
            # Not inside `context.at`: a region that begins or ends in the function must stay so after it.
            self._is_first = False
            return self._function(*args, **kwargs)
        context = self._context
        # A first forward without the compiler saved other tensors than a compiled one would.
        with context.at(self._place), context.uncompiled() if self._place.is_uncompiled else nullcontext():
            return self._function(*args, **kwargs)


def install(context: SequenceContext, root: nn.Module, handle: Handle) -> None:
    """Replaces the checkpoint functions of torch and DeepSpeed, also where they were bound early.

    Args:
        context: Tells what is split at this moment.
        root: The user's LightningModule.
        handle: Takes the undo.
    """

    def guarded(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return original(_Placed(context, function), *args, **kwargs)

        return checkpoint

    replace_checkpoints(root, handle, guarded)


def replace_checkpoints(
    root: nn.Module, handle: Handle, replacement: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Replaces each checkpoint function of torch and DeepSpeed.

    Args:
        root: The user's LightningModule.
        handle: Takes the undo.
        replacement: Returns what stands for a function.
    """
    # Models often hold these functions under names bound early, such as a partial in transformers.
    owners: list[tuple[Any, str]] = [(torch.utils.checkpoint, "checkpoint")]
    of_deepspeed = checkpointing()
    if of_deepspeed is not None:
        owners += [(of_deepspeed, "checkpoint"), (of_deepspeed, "non_reentrant_checkpoint")]
    originals = [getattr(owner, name) for owner, name in owners]
    functions = {original: replacement(original) for original in originals}
    for (owner, name), original in zip(owners, originals, strict=True):
        handle.patch(owner, name, functions[original])
    rebind(handle, root, functions)
