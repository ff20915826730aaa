"""Dropout of tokens that each rank draws for its own slice, see `attention.draws`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_ulysses.attention.draws import own_draws
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.patching.handle import Handle


def _carries_tokens(x: Tensor, batch: LocalBatch, share: int) -> bool:
    """Whether one of the dimensions is as long as this rank's slice, or as its slices of all rows."""
    return share in x.shape or batch.rows * share in x.shape


def install(context: SequenceContext) -> Handle:
    """Has dropout draw for this rank's tokens alone, where P > 1; in what is compiled it stays as it is.

    Dropout of a tensor without tokens, such as a condition for the whole sample, is the same on all ranks of a group.
    So is dropout of whole channels.

    Returns:
        A handle whose ``remove()`` restores everything.
    """

    def wrap(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(original)
        def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
            if torch.compiler.is_compiling() or not training or not p:
                return original(input, p, training, inplace)
            batch = context.split
            if batch is None or not _carries_tokens(input, batch, context.share):
                return original(input, p, training, inplace)
            with own_draws(context.mesh, input.device):
                return original(input, p, training, inplace)

        return dropout

    handle = Handle()
    functional: Any = torch.nn.functional
    if context.mesh.sp_size > 1:
        for name in ("dropout", "alpha_dropout"):
            handle.patch(functional, name, wrap(getattr(functional, name)))
    return handle
