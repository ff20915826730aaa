"""Random numbers of its own for each rank's heads, also where all ranks have been seeded alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightning_ulysses.mesh import SequenceMesh


@contextmanager
def own_draws(mesh: SequenceMesh, device: torch.device, dropout_p: float) -> Iterator[None]:
    """Draws inside differ between ranks; behind it, the generators stand where they would on any other rank.

    ``seed_everything`` seeds all ranks alike, and then the first head of each would drop the same weights. The seed is
    drawn from the CPU's generator, which activation checkpointing puts back for its second forward.
    """
    if not dropout_p:
        yield
        return
    seed = int(torch.randint(2**62, ())) + mesh.dp_rank * mesh.sp_size + mesh.sp_rank
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        torch.manual_seed(seed)
        yield
