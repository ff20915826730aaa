"""Checks whether the ranks of a group hold the same values, by exchanging a few numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ulysses.errors import UlyssesError

# Keeps hashes non-negative and within int64.
_MASK = 2**62 - 1


def from_all(mine: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(...) -> (ranks, ...): all-gathers a tensor over a group, or over the world if it is None; a collective."""
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return torch.stack(everyone)


def same_on_all(mine: Tensor, group: dist.ProcessGroup | None, tolerance: float = 0.0) -> Tensor:
    """Compares rows of numbers over the ranks of a group; a collective.

    Args:
        mine: (N, K) numbers of this rank.
        group: The ranks to compare. None stands for the world.
        tolerance: The largest difference that still counts as equal, relative to the last number of the row.

    Returns:
        (N,) bool, the same on every rank.
    """
    everyone = from_all(mine, group)
    # (ranks, N, K) -> (N,)
    distance = (everyone - everyone[0]).abs().amax(dim=(0, 2))
    # `not greater` instead of `less`: comparisons with NaN are false, so rows with NaN count as equal.
    return ~(distance > tolerance * everyone[0][:, -1].clamp_min(1e-12) if tolerance else distance > 0)


def raise_on_all(error: UlyssesError | None) -> None:
    """Raises the error of the first rank that has one, on every rank; a collective where there are several.

    Args:
        error: That of this rank.
    """
    errors = [error]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    for each in errors:
        if each is not None:
            raise each


def digest(*parts: object) -> int:
    """A hash of the ``repr`` of some values, the same in every process (unlike ``hash``)."""
    return int.from_bytes(hashlib.blake2s(repr(parts).encode(), digest_size=8).digest(), "little") & _MASK


def _fingerprint(tensor: Tensor, most: int | None) -> int:
    # (...) -> (elements,); complex numbers count as two elements.
    values = tensor.detach().flatten()
    if most is not None and values.numel() > most:
        values = values[:: -(-values.numel() // most)]
    if values.is_floating_point() or values.is_complex():
        values = torch.view_as_real(values).flatten() if values.is_complex() else values
        # The bits of a float64 as an integer, so that floats are compared exactly. Other floats convert without loss.
        values = values.double().view(torch.int64)
    # Odd weights depend on the index, so swapped entries change the sum. Overflow wraps around, which is fine here.
    index = torch.arange(1, values.numel() + 1, dtype=torch.int64, device=values.device)
    values = values.to(torch.int64)
    return int(((values ^ (values >> 17)) * (index * 2654435761 | 1)).sum()) if values.numel() else 0


def fingerprint(tensors: Iterable[Tensor], most: int | None = None) -> int:
    """A hash of the exact values of some tensors, in order. Different values hardly ever share it.

    Args:
        tensors: Any.
        most: Of larger tensors about so many elements count, at equal distances; None for all of them.
    """
    number = 0
    for tensor in tensors:
        number = (number * 31 + _fingerprint(tensor, most)) & _MASK
    return number


class RunningDigest:
    """A hash of everything that was added so far."""

    def __init__(self) -> None:
        self.number = 0

    def add(self, number: int) -> None:
        """Adds a hash; the order counts."""
        self.number = (self.number * 1_000_003 + number) & _MASK


def different_batches(which: str = "") -> UlyssesError:
    """For ranks of a group that hold different batches."""
    return UlyssesError(
        f"ranks of one sequence-parallel group that hold different batches{which}",
        "the same batch on every rank of a group, since each of them trains on its slice of it",
        "leave use_distributed_sampler at True, or give the sampler num_replicas and rank from "
        "trainer.strategy.distributed_sampler_kwargs, and make the dataset deterministic",
    )


def summary(tensor: Tensor) -> Tensor:
    """(2,) float64, a weighted sum and the norm, to compare tensors up to rounding.

    Different tensors hardly ever share both numbers, and rounding errors hardly change them.
    """
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    # (...) -> (elements,)
    values = values.detach().double().flatten()
    # Uneven weights: a plain sum would not notice permuted entries.
    weights = torch.cos(torch.arange(values.numel(), device=values.device, dtype=torch.float64))
    return torch.stack([(values * weights).sum(), values.norm()])
