"""A few tokens of a batch, as a batch of the same type."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_ulysses.batch.whole import read_batch
from lightning_ulysses.geometry.batch_keys import BatchRules

_EDGES = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")


def excerpt(batch: Any, rules: BatchRules, begin: int, count: int) -> Any:
    """The tokens from ``begin`` to ``begin + count`` of every row.

    Args:
        batch: A whole batch.
        rules: How to read it.
        begin: The first token.
        count: How many of them.
    """
    dims = read_batch(batch, rules, 1).dims

    def cut(key: str, value: Any) -> Any:
        if key in _EDGES and isinstance(value, Tensor):
            # Boundaries before or after the excerpt fall together, and each must be there only once.
            return (value - begin).clamp(0, count).unique()
        dim = dims.get(key)
        return value if dim is None or key not in given else value.narrow(dim, begin, count).contiguous()

    if isinstance(batch, Tensor):
        given = {"batch"}
        return cut("batch", batch)
    if hasattr(batch, "items"):
        given = set(batch)
        return {key: cut(key, value) for key, value in batch.items()}
    given = {str(index) for index in range(len(batch))}
    values = [cut(str(index), value) for index, value in enumerate(batch)]
    return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
