"""Checks that the ranks of a group computed the same tensors before the split."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.agreement import same_on_all, summary
from lightning_ulysses.exchange.mesh import SequenceMesh


def check_same_inputs(mesh: SequenceMesh, name: str, leaves: Mapping[str, list[Tensor]]) -> None:
    """Compares the tensors that are about to be cut over the ranks of a group; a collective.

    Raises:
        UlyssesError: On every rank, if they differ by more than rounding errors.
    """
    keys = [key for key, tensors in leaves.items() for _ in tensors]
    # (tensors, 2)
    mine = torch.stack([summary(tensor) for tensors in leaves.values() for tensor in tensors])
    same = same_on_all(mine, mesh.sp_group, tolerance=1e-2).tolist()
    different = list(dict.fromkeys(key for key, is_same in zip(keys, same, strict=True) if not is_same))
    if different:
        raise UlyssesError(
            f"{', '.join(different)} of {name} that the ranks of one sequence-parallel group computed differently",
            "the same whole tensor on every rank, since each of them goes on with its slice",
            "draw random numbers from the default generators, which a group shares in every step, or seed a generator "
            "of your own by trainer.strategy.mesh.dp_rank, which a group has in common",
        )
