"""Ranks train the same parameters: each of them has the gradients of its slice, which are added up."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.agreement import digest


def check_trained(module: nn.Module) -> None:
    """Compares over all ranks which parameters are trained; a collective.

    Args:
        module: The user's.

    Raises:
        UlyssesError: On every rank, with the parameters that only some of them train.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, digest(trained))
    if everyone.count(everyone[0]) == len(everyone):
        return
    dist.all_gather_object(everyone, trained)
    known = set.intersection(*map(set, everyone))
    apart = [name for name in dict.fromkeys(name for names in everyone for name in names) if name not in known]
    ranks = [rank for rank, names in enumerate(everyone) if apart and apart[0] in names]
    shown = f"{', '.join(apart[:4])}{', ...' * (len(apart) > 4)}" if apart else "the same parameters in another order"
    raise UlyssesError(
        f"ranks that train different parameters: {shown}" + f" (requires_grad on ranks {ranks} only)" * bool(apart),
        "the same requires_grad on every rank, since the gradients of all slices are added up",
        "freeze parameters by what is the same on every rank, and not by the rank or what its slice holds",
    )
