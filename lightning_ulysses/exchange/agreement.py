"""Whether the ranks of a group hold the same: one exchange of a few numbers, for every check of that kind."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

_MASK = 2**62 - 1


def from_all(mine: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(...) -> (ranks, ...): the same tensor of every rank of a group, of the world if None; a collective."""
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return torch.stack(everyone)


def same_on_all(mine: Tensor, group: dist.ProcessGroup | None, tolerance: float = 0.0) -> Tensor:
    """Compares rows of numbers over the ranks of a group, of the world if None; a collective.

    Args:
        mine: (N, K) numbers of this rank.
        group: The ranks.
        tolerance: The largest difference that is none, relative to the last number of the row.

    Returns:
        (N,) of bool, the same on every rank.
    """
    everyone = from_all(mine, group)
    # (ranks, N, K) -> (N,)
    distance = (everyone - everyone[0]).abs().amax(dim=(0, 2))
    # Non-finite values are no sign of another tensor: a comparison with NaN is false.
    return ~(distance > tolerance * everyone[0][:, -1].clamp_min(1e-12) if tolerance else distance > 0)


def digest(*parts: object) -> int:
    """A number that two different values hardly ever share, by their ``repr``."""
    return int.from_bytes(hashlib.blake2s(repr(parts).encode(), digest_size=8).digest(), "little") & _MASK


def _fingerprint(tensor: Tensor) -> int:
    values = tensor.detach().flatten()
    if values.is_floating_point() or values.is_complex():
        values = torch.view_as_real(values).flatten() if values.is_complex() else values
        values = values.double().view(torch.int64)
    # An order-sensitive sum that wraps around.
    index = torch.arange(1, values.numel() + 1, dtype=torch.int64, device=values.device)
    values = values.to(torch.int64)
    return int(((values ^ (values >> 17)) * (index * 2654435761 | 1)).sum()) if values.numel() else 0


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """A number that two different sequences of tensors hardly ever share: exact values, in order."""
    number = 0
    for tensor in tensors:
        number = (number * 31 + _fingerprint(tensor)) & _MASK
    return number


def summary(tensor: Tensor) -> Tensor:
    """(2,) float64, a sum and the norm: different tensors hardly ever share them, and rounding hardly changes them."""
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    values = values.detach().double().flatten()
    weights = torch.cos(torch.arange(values.numel(), device=values.device, dtype=torch.float64))
    return torch.stack([(values * weights).sum(), values.norm()])
