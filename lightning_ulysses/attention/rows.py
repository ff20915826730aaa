"""What each row of a batch holds, as attention sees it: documents, and the keys that a padding mask keeps."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lightning_ulysses.context import LocalBatch, current_context
from lightning_ulysses.geometry.layout import Runs, clip
from lightning_ulysses.geometry.mask_spec import MaskSpec

#: Documents of a row, and its kept keys; None if all are kept.
Row = tuple[Runs, Runs | None]


def live_batch() -> LocalBatch | None:
    """The batch of the running step, to which facts about all of its layers are attached; None outside of steps."""
    context = current_context()
    return None if context is None else context.place.region or context.place.batch


@dataclass(frozen=True)
class Part:
    """The queries of one document that a run holds, and the keys of it that they may see.

    Attributes:
        begin: The document's first token, in the row.
        queries: How many queries.
        keys: How many keys, from the document's first token on.
        first: The key of the first query.
    """

    begin: int
    queries: int
    keys: int
    first: int


def parts_of(documents: Runs, first: int, last: int, causal: bool) -> list[Part]:
    """The documents of a row that queries ``first:last`` belong to. Causal ones see no key after that of the last."""
    parts = []
    for begin, end in documents:
        if begin < last and end > first:
            stop = min(end, last)
            parts.append(
                Part(begin, stop - max(begin, first), (stop if causal else end) - begin, max(first - begin, 0))
            )
    return parts


def tokens_of(tensor: Tensor, begin: int, end: int) -> Tensor:
    """(B, heads, S, D) -> (B, heads, end - begin, D); the tensor itself if that is all of it."""
    return tensor if (begin, end) == (0, tensor.shape[2]) else tensor[:, :, begin:end]


def _row(spec: MaskSpec, row: int, length: int) -> Row:
    """Documents and kept keys of one row. Chunks become documents, and added padding becomes keys that are dropped."""
    documents = spec.documents[row] if spec.documents is not None else ((0, length),)
    valid = spec.valid[row] if spec.valid is not None else None
    # Causal attention needs no care: the padding is at the end, where no real token sees it.
    if spec.num_padding and not spec.causal:
        valid = clip(valid if valid is not None else ((0, length),), 0, length - spec.num_padding)
    if spec.chunk is not None:
        # Chunks are counted after the left padding, which becomes a document of its own. Then each chunk is a document.
        left = valid[0][0] if valid else 0
        if 0 < left < documents[0][1]:
            documents = ((0, left), (left, documents[0][1]), *documents[1:])
        documents = tuple(
            (place, min(place + spec.chunk, end)) for begin, end in documents for place in range(begin, end, spec.chunk)
        )
    return documents, valid


@dataclass
class KnownRows:
    """A note on a batch: its rows for each kind of mask, which all layers share."""

    known: dict[tuple[object, ...], tuple[MaskSpec, list[Row]]] = field(default_factory=dict)


def rows_of(spec: MaskSpec, rows: int, length: int) -> list[Row]:
    """What each row holds, or what the first one holds if all rows are equal. Built once for each batch.

    Args:
        spec: The keys that each query sees.
        rows: B.
        length: S.
    """

    def build() -> list[Row]:
        built = [_row(spec, row, length) for row in range(rows)]
        return built[:1] if all(row == built[0] for row in built) else built

    batch = live_batch()
    if batch is None:
        return build()
    known = batch.notes.of(KnownRows).known
    # By identity: hashing thousands of documents in each layer would cost what this saves.
    held = tuple(tuple(id(row) for row in part) if part is not None else None for part in (spec.documents, spec.valid))
    key = (*held, spec.chunk, spec.num_padding, spec.causal, rows, length)
    if key not in known:
        # Together with the spec, so that nothing else gets the place in memory of its documents.
        known[key] = spec, build()
    return known[key][1]
