"""Compares a batch over the ranks that share it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ulysses.batch.whole import WholeBatch
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.mesh import SequenceMesh


def _fingerprint(tensor: Tensor) -> int:
    """A number that two equal tensors share and two different ones hardly ever do."""
    values = tensor.detach().flatten()
    values = values.double().view(torch.int64) if values.is_floating_point() else values.to(torch.int64)
    # An order-sensitive sum that wraps around.
    index = torch.arange(1, values.numel() + 1, dtype=torch.int64)
    return int(((values ^ (values >> 17)) * (index * 2654435761 | 1)).sum()) if values.numel() else 0


def check_same_batch(whole: WholeBatch, mesh: SequenceMesh, device: torch.device, everywhere: bool) -> None:
    """Compares the batch over the ranks of a sequence-parallel group, by length and fingerprint.

    Args:
        whole: This rank's batch.
        mesh: Sizes and groups.
        device: Where collectives take place.
        everywhere: Lets every rank of the world hear of a group that differs, so that none waits for it; only where
            all data-parallel ranks have equally many batches.

    Raises:
        UlyssesError: On every rank of the group (of the world with ``everywhere``), if they hold different batches.
    """
    if mesh.sp_group is None:
        return
    fingerprint = 0
    for tensor in whole.tensors.values():
        fingerprint = (fingerprint * 31 + _fingerprint(tensor)) & (2**62 - 1)
    mine = torch.tensor([whole.layout.seq_len, fingerprint], dtype=torch.int64, device=device)
    received = [torch.empty_like(mine) for _ in range(mesh.world_size if everywhere else mesh.sp_size)]
    dist.all_gather(received, mine, group=None if everywhere else mesh.sp_group)
    for first in range(0, len(received), mesh.sp_size):
        group = received[first : first + mesh.sp_size]
        if any(not torch.equal(other, group[0]) for other in group):
            raise UlyssesError(
                "ranks of one sequence-parallel group that hold different batches (sequence lengths "
                f"{[int(other[0]) for other in group]})",
                "the same batch on every rank of a group, since each of them trains on its slice of it",
                "leave use_distributed_sampler at True, or give the sampler num_replicas and rank from "
                "trainer.strategy.distributed_sampler_kwargs, and make the dataset deterministic",
            )
