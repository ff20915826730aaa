"""Where the documents of a packed batch begin, and which of its tokens a padding mask keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.layout import Runs, cu_seqlens_to_runs, runs_from_starts


def document_runs(
    entries: Mapping[str, Any], positions: Tensor | None, rows: int, seq_len: int
) -> tuple[Runs, ...] | None:
    """The documents of each row, from ``cu_seqlens`` or else from where ``position_ids`` do not grow by one.

    Args:
        entries: The batch.
        positions: Its ``position_ids``, padded.
        rows: B.
        seq_len: S, padding included.

    Returns:
        Runs for each row, or None when every row is one document.

    Raises:
        UlyssesError: If ``cu_seqlens`` comes with several rows or does not fit them.
    """
    cu_seqlens = next((entries[key] for key in ("cu_seqlens", "cu_seq_lens_q") if entries.get(key) is not None), None)
    if isinstance(cu_seqlens, Tensor):
        if rows != 1 or cu_seqlens.dim() != 1:
            raise UlyssesError(
                f"cu_seqlens of shape {tuple(cu_seqlens.shape)} with {rows} rows",
                "cu_seqlens (documents + 1,) with one row (1, S)",
                "pack all documents into one row, or mark them by position_ids that restart at 0",
            )
        return (cu_seqlens_to_runs(cu_seqlens.tolist(), seq_len),)
    if positions is None or positions.dim() > 2:
        return None
    # (S,) or (1, S) or (B, S) -> (B, S)
    breaks = torch.diff(positions.expand(rows, -1), dim=1) != 1
    if not bool(breaks.any()):
        return None
    return tuple(runs_from_starts((row.nonzero().flatten() + 1).tolist(), seq_len) for row in breaks)


def valid_runs(attention_mask: Tensor | None) -> tuple[Runs, ...] | None:
    """For each row of a 2-D padding mask (B, S) the runs of tokens that it keeps; None when it keeps all of them."""
    if attention_mask is None:
        return None
    mask = attention_mask.bool()
    if bool(mask.all()):
        return None
    # A run begins where the mask rises and ends where it falls.
    edges = torch.nn.functional.pad(mask.to(torch.int8), (1, 1)).diff(dim=1)
    rows = []
    for row in edges:
        begins, ends = (row == 1).nonzero().flatten().tolist(), (row == -1).nonzero().flatten().tolist()
        rows.append(tuple(zip(begins, ends, strict=True)))
    return tuple(rows)
