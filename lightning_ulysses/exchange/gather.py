"""Gathers the slices of a group into the whole sequence."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def join_sequence(x: Tensor, shares: tuple[int, ...], dim: int, group: dist.ProcessGroup) -> Tensor:
    """All-gathers slices of S_r tokens along ``dim`` into the whole sequence, without gradients."""
    # (..., S_r, ...) -> (S_r, ...) -> (largest share, ...): all_gather wants the same shape on every rank.
    local = x.detach().movedim(dim, 0)
    padded = local.new_zeros(max(shares), *local.shape[1:])
    padded[: local.shape[0]] = local
    parts = [torch.empty_like(padded) for _ in shares]
    dist.all_gather(parts, padded, group=group)
    # Each (S_i, ...) -> (S, ...) -> (..., S, ...)
    return torch.cat([part[:share] for part, share in zip(parts, shares, strict=True)]).movedim(0, dim).contiguous()


def name_of_gather() -> str:
    """The function of `torch.distributed` that gathers into one tensor: torch 2.13 has renamed it."""
    return "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


def gather_single(mine: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """(elements,) of each rank -> (ranks * elements,), by one collective into one tensor."""
    everyone = mine.new_empty(dist.get_world_size(group) * mine.numel())
    getattr(dist, name_of_gather())(everyone, mine, group=group)
    return everyone
