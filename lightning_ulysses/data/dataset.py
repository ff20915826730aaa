"""A dataset of packs on top of a dataset of documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import suppress
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from lightning_ulysses.data.packing import Ints, Piece, check_lengths
from lightning_ulysses.data.rows import read_row
from lightning_ulysses.errors import UlyssesError

Lengths = str | Sequence[int] | np.ndarray | Tensor | Callable[[Any], Any]


def documents_in(dataset: Any) -> int:
    """The number of documents of a dataset.

    Raises:
        UlyssesError: If the dataset has no length.
    """
    if isinstance(dataset, Sized):
        # An iterable dataset may have a __len__ that only raises.
        with suppress(TypeError, NotImplementedError):
            return len(dataset)
    raise UlyssesError(
        f"a dataset of type {type(dataset).__name__} without a length",
        "documents that can be counted and asked for by number",
        "use PackedStream for documents that come one after the other",
    )


def read_lengths(dataset: Any, lengths: Lengths) -> Ints:
    """The number of tokens of each document.

    Args:
        dataset: The documents.
        lengths: The lengths; or the name of a column with the lengths; or the name of a column with one entry per
            token, such as ``"input_ids"``; or a function that computes the lengths from the dataset.

    Returns:
        (documents,) tokens of each.

    Raises:
        UlyssesError: If there is no such column, or `check_lengths` finds an error.
    """
    documents = documents_in(dataset)
    if isinstance(lengths, str):
        found: Any = _column(dataset, lengths) if documents else []
        if documents and isinstance(found[0], Sized):
            found = [len(value) for value in found]
    else:
        found = lengths(dataset) if callable(lengths) else lengths
    return check_lengths(found, documents)


def _column(dataset: Any, name: str) -> Any:
    columns = getattr(dataset, "column_names", None)
    if columns is None and isinstance(dataset[0], Mapping):
        if name in dataset[0]:
            return [dataset[index][name] for index in range(len(dataset))]
        columns = list(dataset[0])
    if columns is None or name not in columns:
        found = f"the columns {columns}" if columns else "no columns"
        raise UlyssesError(
            f"lengths={name!r} for a {type(dataset).__name__} with {found}",
            "a column with the number of tokens of each document, or with the tokens themselves",
            "name such a column, or pass the lengths as an array",
        )
    # In numpy format, a column of numbers comes as one array instead of one object per row.
    whole = dataset.with_format("numpy") if hasattr(dataset, "with_format") else dataset
    return whole[name][:]


def _tokens(row: Any) -> int | None:
    """The number of tokens of a row, or None if the row does not show it."""
    if isinstance(row, Mapping):
        ids = row.get("input_ids")
        mask = row.get("attention_mask")
        return None if ids is None else len(ids) if mask is None else int(np.asarray(mask).astype(bool).sum())
    if isinstance(row, (list, np.ndarray, Tensor)):
        return len(row)
    return None


def _cut(row: Any, piece: Piece) -> Any:
    if isinstance(row, Mapping):
        return {key: tensor[piece.begin : piece.end] for key, tensor in read_row(row).items()}
    if isinstance(row, (list, np.ndarray, Tensor)):
        return row[piece.begin : piece.end]
    raise UlyssesError(
        f"document {piece.index}, a {type(row).__name__}, of which a pack holds tokens {piece.begin} to {piece.end}",
        "a mapping with input_ids, or a list, array or tensor of tokens",
        "return such rows from the dataset, or set overlong='drop'",
    )


class PackedDataset(Dataset[list[Any]]):
    """Takes a pack from `SequenceShardSampler` as index, and returns the rows of its documents.

    A whole document is returned as the dataset gives it. If a pack holds only a part of a document, that part is
    returned. Of a mapping these are the per-token fields as tensors; of a list, array or tensor it is a slice.

    Args:
        dataset: The documents; ``dataset[i]`` is one of them.
        lengths: (documents,) the expected number of tokens of each.

    Raises:
        UlyssesError: On access, if a document has another length, or cannot be cut.
    """

    def __init__(self, dataset: Any, lengths: Ints) -> None:
        self.dataset = dataset
        self.lengths = lengths

    def __len__(self) -> int:
        """The number of documents. Only the sampler knows how many packs they make."""
        return len(self.lengths)

    def __getitem__(self, pack: int | Sequence[int | Piece]) -> list[Any]:
        """The rows of a pack. A single number stands for a pack with just that document."""
        pieces = [pack] if isinstance(pack, int) else pack
        indices = [piece.index if isinstance(piece, Piece) else piece for piece in pieces]
        # Batched access of torch dataloaders: Hugging Face datasets read all rows at once.
        many = getattr(self.dataset, "__getitems__", None)
        rows = many(indices) if callable(many) else [self.dataset[index] for index in indices]
        for index, row in zip(indices, rows, strict=True):
            if _tokens(row) not in (None, self.lengths[index]):
                raise UlyssesError(
                    f"document {index} of {_tokens(row)} tokens, for which lengths says {self.lengths[index]}",
                    "the lengths of the very documents that are loaded",
                    "compute the lengths anew, after tokenizing and filtering",
                )
        return [_cut(row, piece) if isinstance(piece, Piece) else row for piece, row in zip(pieces, rows, strict=True)]
