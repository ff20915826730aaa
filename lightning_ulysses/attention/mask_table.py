"""Tables of known masks and document boundaries, so that tensors need not be read from the device again."""

from __future__ import annotations

from contextlib import suppress

from torch import Tensor

from lightning_ulysses.context import LocalBatch, current_context
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.layout import Runs, cu_seqlens_to_runs
from lightning_ulysses.geometry.mask_spec import MaskSpec
from lightning_ulysses.notes import StorageTable, version


class MaskTable(StorageTable[MaskSpec]):
    """A note on a batch: the `MaskSpec` of the whole sequence for each known mask tensor."""


class DocumentTable(StorageTable[dict[tuple[object, ...], Runs]]):
    """A note on a batch: the documents of each ``cu_seqlens`` tensor, so that only the first layer reads it."""


def _part(cu_seqlens: Tensor, seq_len: int) -> tuple[object, ...]:
    # The table goes by storage. Another view of it has other values, and so does a later version of it.
    place = cu_seqlens.dtype, cu_seqlens.storage_offset(), cu_seqlens.shape, cu_seqlens.stride()
    return *place, version(cu_seqlens), seq_len


def note_documents(batch: LocalBatch, cu_seqlens: Tensor, values: list[int]) -> None:
    """Takes note of the documents of a tensor whose values are known on the host, so that none has to be read.

    Values that are no documents of the row are left to whoever uses them.
    """
    seq_len = batch.layout.seq_len
    with suppress(UlyssesError):
        batch.notes.of(DocumentTable)[cu_seqlens] = {_part(cu_seqlens, seq_len): cu_seqlens_to_runs(values, seq_len)}


def document_runs(cu_seqlens: Tensor, seq_len: int) -> Runs:
    """The documents of ``cu_seqlens``, read once for each batch: reading from a GPU waits for its queue."""
    context = current_context()
    batch = context.region if context is not None else None
    # Outside of steps there is no batch to attach the table to. In inference mode nothing counts writes to a tensor.
    if batch is None or cu_seqlens.is_inference():
        return cu_seqlens_to_runs(cu_seqlens.tolist(), seq_len)
    table = batch.notes.of(DocumentTable)
    known = table.get(cu_seqlens)
    if known is None:
        known = table[cu_seqlens] = {}
    part = _part(cu_seqlens, seq_len)
    if part not in known:
        known[part] = cu_seqlens_to_runs(cu_seqlens.tolist(), seq_len)
    return known[part]
