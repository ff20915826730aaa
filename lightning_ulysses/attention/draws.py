"""Random numbers that differ between the ranks of a group, for dropout of each rank's own heads and tokens.

Everything else in a step draws the same numbers on all ranks of a group. For example, they must agree on the noise
level of a sample, and on a layer that is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightning_ulysses.exchange.mesh import SequenceMesh


@contextmanager
def own_draws(mesh: SequenceMesh, device: torch.device) -> Iterator[None]:
    """Makes random draws differ between ranks. Afterwards the generators are in the same state on all ranks again.

    Otherwise dropout would use the same mask for the first head of each rank, or for the first token of each slice.
    """
    # Drawn from the CPU generator, since activation checkpointing restores that one for the second forward.
    seed = int(torch.randint(2**62, ())) + mesh.dp_rank * mesh.sp_size + mesh.sp_rank
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        torch.manual_seed(seed)
        yield
