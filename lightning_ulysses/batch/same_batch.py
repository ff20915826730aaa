"""Compares a batch over the ranks that share it."""

from __future__ import annotations

import torch

from lightning_ulysses.batch.whole import WholeBatch
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.agreement import fingerprint, from_all
from lightning_ulysses.exchange.mesh import SequenceMesh


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
