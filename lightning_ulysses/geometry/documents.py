"""Document boundaries of packed rows, and the tokens that a padding mask keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.batch_keys import EDGE_KEYS, LABEL_KEYS
from lightning_ulysses.geometry.layout import Runs, cu_seqlens_to_runs, runs_from_starts


def _restarts(positions: Tensor, kept: Tensor) -> Tensor:
    """(B, S) bool: the tokens that start a new document.

    A kept token does so if its position is lower than that of the previous kept token, or if both have the position 0
    or that at which the row begins: a document of one token. Positions that jump ahead go on in the same document.
    Padding itself may have any position and never starts a document.

    Example:
        Positions 0 1 2 0 1 mark documents of 3 and 2 tokens, and 0 1 2 9 10 none.

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
    first = positions.gather(1, kept.int().argmax(dim=1, keepdim=True))
    # The first kept token of a row (before == -1) starts no new document: it belongs to the first one.
    is_first = (positions == first) | (positions == 0)
    return kept & (before >= 0) & ((step < 0) | ((step == 0) & is_first))


def read_edges(name: str, value: Any) -> list[int]:
    """The entries of ``cu_seqlens``: a tensor, an array, or a list or tuple of numbers.

    Raises:
        UlyssesError: If it is anything else than one row of integers.
    """
    try:
        edges = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _no_edges(name, f"of type {type(value).__name__} ({error})") from error
    if edges.dim() != 1 or edges.is_floating_point() or edges.is_complex() or edges.dtype == torch.bool:
        kind = "" if isinstance(value, Tensor) else f", a {type(value).__name__}"
        raise _no_edges(name, f"of shape {tuple(edges.shape)} and {edges.dtype}{kind}")
    return [int(edge) for edge in edges.tolist()]


def _no_edges(name: str, what: str) -> UlyssesError:
    return UlyssesError(
        f"{name} {what}",
        "the cumulative lengths of the documents in one row (1, S): integers (documents + 1,)",
        f"pass {name} as torch.tensor([0, 5, 9], dtype=torch.int32), or leave it out and let position_ids restart at 0",
    )


def _runs(begins: Tensor) -> tuple[Runs, ...]:
    """For each row of (B, S) bool, which marks where documents begin, the documents."""
    return tuple(runs_from_starts(row.nonzero().flatten().tolist(), begins.shape[1]) for row in begins)


def sequences_without_cache(positions: Tensor | None, rows: int) -> tuple[Runs, ...] | None:
    """What transformers takes for documents where a call has no mask and no cache: every step but one of 1 begins one.

    Source: transformers ``masking_utils.find_packed_sequence_indices``.

    Args:
        positions: ``position_ids``.
        rows: B.

    Returns:
        Runs for each row, or None if every row is one document.
    """
    if positions is None or positions.dim() > 2:
        return None
    # (S,) or (1, S) or (B, S) -> (B, S)
    positions = positions.expand(rows, -1)
    begins = torch.nn.functional.pad(positions.diff(dim=1) != 1, (1, 0))
    return _runs(begins) if bool(begins.any()) else None


def document_runs(
    entries: Mapping[str, Any], positions: Tensor | None, rows: int, seq_len: int, attention_mask: Tensor | None = None
) -> tuple[Runs, ...] | None:
    """The documents of each row, from ``cu_seqlens``, or else from ``position_ids`` that restart.

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
        UlyssesError: If ``cu_seqlens`` is no row of integers, comes with several rows or does not fit them, or if every
            token would be a document of its own.
    """
    name = next((key for key in EDGE_KEYS if entries.get(key) is not None), None)
    if name is not None:
        edges = read_edges(name, entries[name])
        if rows != 1:
            raise UlyssesError(
                f"{name} of shape ({len(edges)},) with {rows} rows",
                f"{name} (documents + 1,) with one row (1, S)",
                "pack all documents into one row, or mark them by position_ids that restart at 0",
            )
        return (cu_seqlens_to_runs(edges, seq_len),)
    # Positions of more dimensions, such as (3, B, S) of multimodal models, do not mark documents.
    if positions is None or positions.dim() > 2:
        return None
    # (S,) or (1, S) or (B, S) -> (B, S)
    positions = positions.expand(rows, -1)
    if attention_mask is None or attention_mask.dim() != 2:
        attention_mask = torch.ones_like(positions)
    kept = attention_mask.bool().expand(rows, -1)
    begins = _restarts(positions, kept)
    # None instead of one run for each row: attention then needs no document mask.
    if not bool(begins.any()):
        return None
    labels = [label for key in LABEL_KEYS if isinstance(label := entries.get(key), Tensor)]
    # Documents of one token each have nothing to predict.
    is_idle = bool(labels) and all(bool((label < 0).all()) for label in labels)
    # The first kept token of a row begins its first document.
    if not is_idle and int(begins.sum() + kept.any(dim=1).sum()) == int(kept.sum()):
        raise UlyssesError(
            f"position_ids of shape {tuple(positions.shape)} that never grow ({positions[0, :4].tolist()}...), so that "
            "every token is a document of its own",
            "positions that count up within each document: 0 1 2 3 0 1 marks documents of 4 and 2 tokens",
            "leave position_ids out of the batch if each row is one document, or count each document's tokens from 0",
        )
    return _runs(begins)


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
