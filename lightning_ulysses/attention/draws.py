"""Random numbers of its own for each rank's heads and tokens, although all ranks of a group are seeded alike.

They are seeded alike because much of what a step draws must be the same on all of them: the noise level of a sample, a
layer that is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightning_ulysses.exchange.mesh import SequenceMesh


@contextmanager
def own_draws(mesh: SequenceMesh, device: torch.device) -> Iterator[None]:
    """Draws inside differ between ranks; behind it, the generators stand where they would on any other rank.

    Else the first head of each, or the first token, would drop the same. The seed is drawn from the CPU's generator,
    which activation checkpointing puts back for its second forward.
    """
    seed = int(torch.randint(2**62, ())) + mesh.dp_rank * mesh.sp_size + mesh.sp_rank
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        torch.manual_seed(seed)
        yield
