"""Has all ranks end a training epoch with the same batch: a rank that goes on would wait for the others for ever."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.agreement import from_all
from lightning_ulysses.exchange.mesh import SequenceMesh

# Of a dataloader that does not know its length.
_UNKNOWN = -1


def length_of(loader: Any) -> int:
    """Batches of a dataloader; -1 if it does not know."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return _UNKNOWN


def check_groups(counts: Sequence[Any], sp_size: int, what: str) -> None:
    """Refuses ranks of a group that have different numbers of batches.

    Args:
        counts: Those of each rank of the world.
        sp_size: P; consecutive ranks form a group.
        what: The batches, for the message.

    Raises:
        UlyssesError: On every rank.
    """
    for first in range(0, len(counts), sp_size):
        group = list(counts[first : first + sp_size])
        if any(count != group[0] for count in group):
            raise UlyssesError(
                f"{group} {what} on the ranks of one sequence-parallel group",
                "the same batches on every rank of a group, since each of them trains on its slice of them",
                "leave use_distributed_sampler at True, or give the sampler num_replicas and rank from "
                "trainer.strategy.distributed_sampler_kwargs, and have every rank read the same data",
            )


class SameLength:
    """Cuts epochs to the length of the shortest one of all data-parallel groups.

    Args:
        mesh: Sizes and groups.
        device: The device for collectives.
    """

    def __init__(self, mesh: SequenceMesh, device: torch.device) -> None:
        self._mesh = mesh
        self._device = device
        self._is_told = False

    def of_epoch(self, loader: Any) -> tuple[int | None, bool]:
        """Compares the lengths of the ranks' dataloaders; a collective.

        Args:
            loader: That of this rank.

        Returns:
            The batches of an epoch that all ranks have, where some rank has more, else None; and whether `of_window`
            has to be asked, since dataloaders do not know their lengths.

        Raises:
            UlyssesError: On every rank, if a group disagrees, or some rank has no batch or does not know its length.
        """
        if self._mesh.world_size == 1:
            return None, False
        counts = self._from_all(length_of(loader))
        check_groups(counts, self._mesh.sp_size, "training batches (-1: unknown)")
        least, most = min(counts), max(counts)
        if least < most and least <= 0:
            raise UlyssesError(
                f"training dataloaders of {counts[:: self._mesh.sp_size]} batches in the data-parallel groups "
                "(-1: unknown)",
                "at least one batch for each group, or dataloaders none of which knows its length",
                "give every group data of its own, read in the same way",
            )
        if least < most:
            self._tell(least, most)
            return least, False
        # A stream that deals from one common order ends on all ranks together.
        return None, least == _UNKNOWN and not getattr(getattr(loader, "dataset", None), "ends_together", False)

    def of_window(self, mine: int) -> int:
        """Micro-batches of the next accumulation window that all ranks have; a collective.

        Args:
            mine: Those that this rank has loaded.

        Raises:
            UlyssesError: On every rank, if a group disagrees.
        """
        counts = self._from_all(mine)
        check_groups(counts, self._mesh.sp_size, "batches left in this epoch (counted up to the next optimizer step)")
        if min(counts) < max(counts):
            self._tell(None, None)
        return min(counts)

    def _from_all(self, mine: int) -> list[int]:
        # (W, 1) -> (W,)
        return from_all(torch.tensor([mine], dtype=torch.int64, device=self._device), None).flatten().tolist()

    def _tell(self, least: int | None, most: int | None) -> None:
        if self._mesh.rank or self._is_told:
            return
        self._is_told = True
        counts = "" if least is None else f": after {least} batches, while others have up to {most}"
        warnings.warn(
            f"Each epoch ends with the data-parallel group that has the fewest batches{counts}. The rest is not "
            "trained on, since all groups take every step together.",
            stacklevel=2,
        )


def evaluates_in_step(counts: Sequence[float], mesh: SequenceMesh, is_partitioned: bool) -> bool:
    """Compares the numbers of evaluation batches of all ranks; a collective.

    Args:
        counts: Those of this rank, for each dataloader; infinite if unknown.
        mesh: Sizes and groups.
        is_partitioned: Whether every forward gathers parameters from all ranks (ZeRO-3).

    Returns:
        Whether all ranks have equally many, and know it.

    Raises:
        UlyssesError: On every rank, if ranks that need each other for a step have different numbers.
    """
    if mesh.world_size == 1:
        return False
    everyone: list[list[float]] = [[]] * mesh.world_size
    dist.all_gather_object(everyone, list(counts))
    check_groups(everyone, mesh.sp_size, "evaluation batches")
    is_same = all(each == everyone[0] for each in everyone)
    if is_partitioned and not is_same:
        raise UlyssesError(
            f"{everyone[:: mesh.sp_size]} evaluation batches in the data-parallel groups, with ZeRO stage 3",
            "equally many in each group, since every forward gathers parameters from all ranks",
            "set limit_val_batches (or limit_test_batches, limit_predict_batches), or use stage 2",
        )
    return is_same and float("inf") not in everyone[0]
