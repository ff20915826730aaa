"""Document boundaries of packed rows, and the tokens that a padding mask keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.layout import Runs, cu_seqlens_to_runs, runs_from_starts


def _restarts(positions: Tensor, kept: Tensor) -> Tensor:
    """(B, S) bool: the tokens that start a new document.

    A kept token continues its document if its position is that of the previous kept token plus one. Positions may also
    count the padding between the two. Padding itself may have any position and never starts a document.

    Example:
        Positions 0 1 2 0 1 mark documents of 3 and 2 tokens.

    Args:
        positions: (B, S).
        kept: (B, S) bool, False for padding.
    """
    places = torch.arange(kept.shape[1], device=kept.device)
    # At each place, the index of the last kept token so far; -1 if there is none.
    last = torch.where(kept, places, -1).cummax(dim=1).values
    # Moved by one, this is the previous kept token of each token.
    before = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
    step = positions - positions.gather(1, before.clamp_min(0))
    # The first kept token of a row (before == -1) starts no new document: it belongs to the first one.
    return kept & (before >= 0) & (step != 1) & (step != places - before)


def document_runs(
    entries: Mapping[str, Any], positions: Tensor | None, rows: int, seq_len: int, attention_mask: Tensor | None = None
) -> tuple[Runs, ...] | None:
    """The documents of each row, from ``cu_seqlens``, or else from ``position_ids`` that do not grow by one.

    Padding belongs to the document before it. Left padding belongs to the first document.

    Args:
        entries: The batch.
        positions: Its ``position_ids``, padded to S.
        rows: B.
        seq_len: S, including padding.
        attention_mask: (B, S) if it is a padding mask, padded to S.

    Returns:
        Runs for each row, or None if every row is one document.

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
    # Positions of more dimensions, such as (3, B, S) of multimodal models, do not mark documents.
    if positions is None or positions.dim() > 2:
        return None
    # (S,) or (1, S) or (B, S) -> (B, S)
    positions = positions.expand(rows, -1)
    if attention_mask is None or attention_mask.dim() != 2:
        attention_mask = torch.ones_like(positions)
    begins = _restarts(positions, attention_mask.bool().expand(rows, -1))
    # None instead of one run for each row: attention then needs no document mask.
    if not bool(begins.any()):
        return None
    return tuple(runs_from_starts(row.nonzero().flatten().tolist(), seq_len) for row in begins)


def valid_runs(attention_mask: Tensor | None) -> tuple[Runs, ...] | None:
    """For each row of a 2-D padding mask (B, S) the runs of tokens that it keeps; None if it keeps all tokens."""
    if attention_mask is None:
        return None
    mask = attention_mask.bool()
    if bool(mask.all()):
        return None
    # A run begins where the mask rises and ends where it falls. The padding makes it rise and fall at the row's ends.
    edges = torch.nn.functional.pad(mask.to(torch.int8), (1, 1)).diff(dim=1)
    rows = []
    for row in edges:
        begins, ends = (row == 1).nonzero().flatten().tolist(), (row == -1).nonzero().flatten().tolist()
        rows.append(tuple(zip(begins, ends, strict=True)))
    return tuple(rows)
