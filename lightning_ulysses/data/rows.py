"""Reads one document into tensors, from a row of a dataset, a tokenizer or a generator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_ulysses.errors import UlyssesError

IGNORED = -100
LABELS = ("labels", "shift_labels")
_KNOWN = ("input_ids", *LABELS, "loss_mask", "attention_mask", "position_ids")
_MADE_HERE = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "shift_loss_mask")


def _is_per_token(key: str, value: Any) -> bool:
    """Whether ``value`` looks like one entry per token. Text, single numbers and metadata do not."""
    if key in _KNOWN:
        return value is not None
    if isinstance(value, (list, tuple)):
        first = value[0] if value else None
        while isinstance(first, (list, tuple)) and first:
            first = first[0]
        return isinstance(first, (bool, int, float)) or (hasattr(first, "dtype") and not isinstance(first, str))
    # Tensors, and numpy arrays of numbers or booleans. Arrays of text or objects have another kind.
    return getattr(value, "ndim", 0) > 0 and getattr(getattr(value, "dtype", None), "kind", "i") in "biuf"


def _tensor(key: str, value: Any) -> Tensor:
    try:
        tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UlyssesError(
            f"row[{key!r}], a {type(value).__name__} that is no array of numbers ({error})",
            "one number for each token",
            f"tokenize the row, or drop the column {key!r} from the dataset",
        ) from error
    if key == "input_ids" and (tensor.dim() != 1 or tensor.is_floating_point()) and tensor.numel():
        raise UlyssesError(
            f"input_ids of shape {tuple(tensor.shape)} and {tensor.dtype} in one row",
            "the token ids of one document, integers of shape (S,)",
            "drop return_tensors='pt' from the tokenizer, or take row['input_ids'][0]",
        )
    if tensor.dtype in (torch.bool, torch.float16, torch.bfloat16, torch.float32):
        return tensor
    return tensor.float() if tensor.is_floating_point() else tensor.long()


def _check_lengths(fields: Mapping[str, Tensor]) -> None:
    lengths = {key: tensor.shape[0] if tensor.dim() else 0 for key, tensor in fields.items()}
    if len(set(lengths.values())) > 1:
        raise UlyssesError(
            f"fields of unequal length in one row: {lengths}",
            "one entry of each field for each token of input_ids",
            "cut or drop the column that is off (dataset.remove_columns) before packing",
        )
    if lengths["input_ids"] == 0:
        raise UlyssesError(
            "a row without a single token", "documents of at least one token", "filter empty rows out of the dataset"
        )


def _without_padding(fields: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drops padding at both ends, as the row's own ``attention_mask`` marks it."""
    mask = fields.pop("attention_mask", None)
    if mask is None or bool(mask.bool().all()):
        return fields
    kept = mask.bool().nonzero().flatten()
    begin, end = (int(kept[0]), int(kept[-1]) + 1) if len(kept) else (0, 0)
    if end - begin != len(kept) or not len(kept):
        raise UlyssesError(
            f"an attention_mask that keeps {len(kept)} of {len(mask)} tokens, not all of them next to each other",
            "one run of real tokens, with padding in front of it or behind it only",
            "drop attention_mask from the rows, or split them into documents",
        )
    return {key: tensor[begin:end] for key, tensor in fields.items()}


def _check_positions(fields: dict[str, Tensor]) -> None:
    given = sorted(set(_MADE_HERE) & set(fields))
    positions = fields.pop("position_ids", None)
    if positions is not None and not torch.equal(positions.flatten(), torch.arange(positions.shape[0])):
        given.append("position_ids")
    if given:
        raise UlyssesError(
            f"rows that carry {', '.join(given)} already",
            "one document per row, whose positions start at 0 and grow by one",
            "unpack the rows, and drop these columns; the collator makes them",
        )


def is_document(row: Any) -> bool:
    """Whether ``row`` is one document: a mapping, or bare tokens. Otherwise it may be a pack of documents."""
    if isinstance(row, (list, tuple)):
        return bool(row) and not isinstance(row[0], (str, bool)) and hasattr(row[0], "__index__") and _dims(row[0]) == 0
    return isinstance(row, Mapping) or _dims(row) == 1


def _dims(value: Any) -> int:
    return int(getattr(value, "ndim", 0))


def read_row(row: Any) -> dict[str, Tensor]:
    """The per-token fields of one document.

    Text, single numbers and other metadata are dropped. So is padding that the row's own ``attention_mask`` marks.
    Reading the result again gives the same result.

    Args:
        row: A mapping with ``input_ids`` and further per-token fields (lists, arrays or tensors), or bare tokens.

    Returns:
        Tensors whose first dimension is the document's length: ``input_ids`` (S,) int64, ``labels`` (S,) int64, and
        every other field. If the row has neither ``labels`` nor ``shift_labels``, ``labels`` is the tensor of
        ``input_ids``.

    Raises:
        UlyssesError: If ``input_ids`` is missing, empty or not that of one document. If the fields differ in length,
            padding lies between tokens, or the row is packed already.
    """
    if not isinstance(row, Mapping) and is_document(row):
        row = {"input_ids": row}
    if not isinstance(row, Mapping) or row.get("input_ids") is None:
        keys = f" with {sorted(map(str, row))}" if isinstance(row, Mapping) else ""
        raise UlyssesError(
            f"a row of type {type(row).__name__}{keys}, without input_ids",
            "a mapping with the document's tokens under 'input_ids'",
            "yield {'input_ids': tokens} from the dataset, or tokenize it first",
        )
    fields = {str(key): _tensor(str(key), value) for key, value in row.items() if _is_per_token(str(key), value)}
    _check_lengths(fields)
    fields = _without_padding(fields)
    _check_positions(fields)
    if not any(key in fields for key in LABELS):
        fields["labels"] = fields["input_ids"]
    return fields


def without_targets(document: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A document with every target ignored, so that its tokens count for nothing; (S, ...) fields."""
    fills = dict.fromkeys(LABELS, IGNORED) | {"loss_mask": 0}
    return {key: torch.full_like(t, fills[key]) if key in fills else t for key, t in document.items()}
