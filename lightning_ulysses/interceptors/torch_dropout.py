"""Makes dropout of activations differ between the ranks of a group, see `attention.draws`."""

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
    """Whether some dimension is S_r or B * S_r long."""
    return share in x.shape or batch.rows * share in x.shape


def install(context: SequenceContext) -> Handle:
    """Patches dropout so that each rank draws for its own tokens. Does nothing if P = 1.

    A tensor without tokens, such as a condition of the whole sample, gets the same dropout on all ranks of a group. So
    does dropout of whole channels. Inside compiled graphs dropout is not changed.

    Returns:
        A handle whose ``remove()`` restores everything.
    """

    def wrap(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(original)
        def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
            # `own_draws` seeds a generator, which a compiled graph cannot do.
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
        # dropout1d to dropout3d drop whole channels and are left alone.
        for name in ("dropout", "alpha_dropout"):
            handle.patch(functional, name, wrap(getattr(functional, name)))
    return handle
