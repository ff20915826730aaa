"""Checks that all ranks of a group hold the same batch."""

from __future__ import annotations

import torch

from lightning_ulysses.batch.whole import WholeBatch
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.agreement import fingerprint, from_all
from lightning_ulysses.exchange.mesh import SequenceMesh


def check_same_batch(whole: WholeBatch, mesh: SequenceMesh, device: torch.device, everywhere: bool) -> None:
    """Compares the batch over the ranks of a group, by length and fingerprint; a collective.

    Args:
        whole: This rank's batch.
        mesh: Sizes and groups.
        device: The device for collectives.
        everywhere: Whether the exchange spans the world. Then all ranks raise together, and no group waits for one that
            stopped. This requires equally many batches on all data-parallel ranks.

    Raises:
        UlyssesError: On every rank of the group, or of the world with ``everywhere``, if a group holds different
            batches.
    """
    if mesh.sp_group is None:
        return
    # The length is for the message; the fingerprint compares all values.
    mine = torch.tensor([whole.layout.seq_len, fingerprint(whole.tensors.values())], dtype=torch.int64, device=device)
    received = from_all(mine, None if everywhere else mesh.sp_group)
    for group in received.split(mesh.sp_size):
        if not bool((group == group[0]).all()):
            raise UlyssesError(
                "ranks of one sequence-parallel group that hold different batches (sequence lengths "
                f"{group[:, 0].tolist()})",
                "the same batch on every rank of a group, since each of them trains on its slice of it",
                "leave use_distributed_sampler at True, or give the sampler num_replicas and rank from "
                "trainer.strategy.distributed_sampler_kwargs, and make the dataset deterministic",
            )
