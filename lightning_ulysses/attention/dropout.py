"""Random numbers of its own for each rank's heads and tokens, although all ranks of a group are seeded alike.

They are seeded alike because much of what a step draws must be the same on all of them: the noise level of a sample, a
layer that is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_ulysses.handle import Handle
from lightning_ulysses.mesh import SequenceMesh
from lightning_ulysses.state import LiveBatch, SequenceState


@contextmanager
def own_draws(mesh: SequenceMesh, device: torch.device, dropout_p: float) -> Iterator[None]:
    """Draws inside differ between ranks; behind it, the generators stand where they would on any other rank.

    Else the first head of each, or the first token, would drop the same. The seed is drawn from the CPU's generator,
    which activation checkpointing puts back for its second forward.
    """
    if not dropout_p:
        yield
        return
    seed = int(torch.randint(2**62, ())) + mesh.dp_rank * mesh.sp_size + mesh.sp_rank
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        torch.manual_seed(seed)
        yield


def _carries_tokens(x: Tensor, batch: LiveBatch, rank: int) -> bool:
    """Whether one of the dimensions is as long as this rank's slice, or as its slices of all rows."""
    share = batch.layout.shares[rank]
    return share in x.shape or batch.rows * share in x.shape


def install(state: SequenceState) -> Handle:
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
            batch = state.sharded_batch
            if batch is None or not _carries_tokens(input, batch, state.mesh.sp_rank):
                return original(input, p, training, inplace)
            with own_draws(state.mesh, input.device, p):
                return original(input, p, training, inplace)

        return dropout

    handle = Handle()
    functional: Any = torch.nn.functional
    if state.mesh.sp_size > 1:
        for name in ("dropout", "alpha_dropout"):
            handle.patch(functional, name, wrap(getattr(functional, name)))
    return handle
