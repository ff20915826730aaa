"""Where the documents of a packed batch begin, and which of its tokens a padding mask keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.layout import Runs, cu_seqlens_to_runs, runs_from_starts


def _restarts(positions: Tensor, kept: Tensor) -> Tensor:
    """(B, S): kept tokens whose position follows that of the kept token before them neither in number nor in place.

    Padding is passed over: it may carry any position, be counted or not, and is no document of its own.

    Args:
        positions: (B, S).
        kept: (B, S) of bool, what is no padding.
    """
    places = torch.arange(kept.shape[1], device=kept.device)
    last = torch.where(kept, places, -1).cummax(dim=1).values
    before = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
    step = positions - positions.gather(1, before.clamp_min(0))
    return kept & (before >= 0) & (step != 1) & (step != places - before)


def document_runs(
    entries: Mapping[str, Any], positions: Tensor | None, rows: int, seq_len: int, attention_mask: Tensor | None = None
) -> tuple[Runs, ...] | None:
    """The documents of each row, from ``cu_seqlens`` or else from where ``position_ids`` do not grow by one.

    Padding belongs to the document before it, left padding to the first.

    Args:
        entries: The batch.
        positions: Its ``position_ids``, padded.
        rows: B.
        seq_len: S, padding included.
        attention_mask: (B, S) where it is a padding mask, padded.

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
    positions = positions.expand(rows, -1)
    if attention_mask is None or attention_mask.dim() != 2:
        attention_mask = torch.ones_like(positions)
    begins = _restarts(positions, attention_mask.bool().expand(rows, -1))
    if not bool(begins.any()):
        return None
    return tuple(runs_from_starts(row.nonzero().flatten().tolist(), seq_len) for row in begins)


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
