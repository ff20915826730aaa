"""Shows that the ranks of a group hold the same numbers where they all compute the whole sequence."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.mesh import SequenceMesh


def _summary(tensor: Tensor) -> Tensor:
    """(2,) float64 that two different tensors hardly ever share, and that rounding hardly changes."""
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    values = values.detach().double().flatten()
    weights = torch.cos(torch.arange(values.numel(), device=values.device, dtype=torch.float64))
    return torch.stack([(values * weights).sum(), values.norm()])


def check_same_inputs(mesh: SequenceMesh, name: str, leaves: Mapping[str, list[Tensor]]) -> None:
    """Compares what is about to be cut over the ranks of a group; a collective.

    Raises:
        UlyssesError: On every rank, if they differ by more than rounding.
    """
    keys = [key for key, tensors in leaves.items() for _ in tensors]
    mine = torch.stack([_summary(tensor) for tensors in leaves.values() for tensor in tensors])
    everyone = [torch.empty_like(mine) for _ in range(mesh.sp_size)]
    dist.all_gather(everyone, mine, group=mesh.sp_group)
    # (P, tensors, 2) -> (tensors,)
    distance = (torch.stack(everyone) - everyone[0]).abs().amax(dim=(0, 2))
    # Non-finite values are no sign of a different tensor.
    wrong = (distance > 1e-2 * everyone[0][:, 1].clamp_min(1e-12)).tolist()
    different = list(dict.fromkeys(key for key, is_wrong in zip(keys, wrong, strict=True) if is_wrong))
    if different:
        raise UlyssesError(
            f"{', '.join(different)} of {name} that the ranks of one sequence-parallel group computed differently",
            "the same whole tensor on every rank, since each of them goes on with its slice",
            "draw random numbers from the default generators, which a group shares in every step, or seed a generator "
            "of your own by trainer.strategy.mesh.dp_rank, which a group has in common",
        )
