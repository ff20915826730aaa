"""Refuses monitored values that differ between ranks: each would act by its own."""

from __future__ import annotations

from typing import Any

import torch

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.agreement import from_all

# Relative difference of values that count as the same.
_TOLERANCE = 1e-6


def check_monitored(device: torch.device, kind: str, monitor: str, value: Any) -> None:
    """Compares a value that is about to be acted on over all ranks; a collective.

    Args:
        device: The device of the collective.
        kind: The class that acts.
        monitor: The name of the value.
        value: The value on this rank; None if it has none.

    Raises:
        UlyssesError: On every rank, if one has another value than the others, or none.
    """
    mine = torch.tensor([value is not None, 0.0 if value is None else float(value)], dtype=torch.float64)
    # (ranks, 2)
    everyone = from_all(mine.to(device), None).cpu()
    others = torch.isclose(everyone, everyone[:1], rtol=_TOLERANCE, atol=0.0, equal_nan=True).all(dim=1).logical_not()
    if others.any():
        other = int(others.nonzero()[0])
        found = [f"{float(everyone[rank, 1]):.6g}" if everyone[rank, 0] else "missing" for rank in (0, other)]
        raise UlyssesError(
            f"{kind}(monitor={monitor!r}), whose value is {found[0]} on rank 0 and {found[1]} on rank {other}",
            "a value that is the same on all ranks, which act by it together",
            "log it on every rank with self.log(..., sync_dist=True), or monitor a loss of TokenCountMonitor",
        )
