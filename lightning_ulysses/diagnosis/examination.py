"""Everything that is looked at, in order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_ulysses.diagnosis.finding import Finding
from lightning_ulysses.diagnosis.kernels import kernels
from lightning_ulysses.diagnosis.machine import build_locks, devices, memory
from lightning_ulysses.diagnosis.versions import versions


@dataclass(frozen=True)
class Shapes:
    """The attention of the model that is to be trained.

    Args:
        heads: H.
        kv_heads: H_kv.
        head_dim: D.
        dtype: Such as ``"bfloat16"``.
        sp_size: P.
    """

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    sp_size: int = 8


def examine(shapes: Shapes, runs: bool = True) -> list[Finding]:
    """Looks at packages, the machine and its devices.

    Args:
        shapes: Of the model's attention.
        runs: Whether to start processes that exchange data and train a step.

    Raises:
        UlyssesError: For shapes that do not fit.
    """
    has_gpu = torch.cuda.is_available()
    found = [*versions(), *devices(), *memory(), *build_locks()]
    device = torch.device("cuda" if has_gpu else "cpu")
    found += kernels(shapes.heads, shapes.kv_heads, shapes.head_dim, shapes.dtype, shapes.sp_size, device)
    if runs:
        # Reads the packages that it needs, and they may be those that are broken.
        from lightning_ulysses.diagnosis.exchange import exchange, parity
        from lightning_ulysses.testing.processes import ProcessPool

        count = torch.cuda.device_count() if has_gpu else 0
        kind, number = ("cuda", count) if count > 1 else ("cpu", 2)
        with ProcessPool(number, timeout=60.0) as pool:
            found += [exchange(pool, kind), parity(pool, kind)]
    return found
