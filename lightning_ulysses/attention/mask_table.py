"""Mask tensors and document boundaries whose meaning is known, looked up instead of read from the device again."""

from __future__ import annotations

from torch import Tensor

from lightning_ulysses.context import current_context
from lightning_ulysses.geometry.layout import Runs, cu_seqlens_to_runs
from lightning_ulysses.geometry.mask_spec import MaskSpec
from lightning_ulysses.notes import StorageTable


class MaskTable(StorageTable[MaskSpec]):
    """A note about a batch: tensors that stand for a `MaskSpec` of the whole sequence."""


class DocumentTable(StorageTable[dict[tuple[int, ...], Runs]]):
    """A note about a batch: documents that ``cu_seqlens`` tensors mark, so that only the first layer reads them."""


def document_runs(cu_seqlens: Tensor, seq_len: int) -> Runs:
    """Reads ``cu_seqlens`` once for each batch: from a GPU this waits for everything that is queued there."""
    context = current_context()
    batch = context.region if context is not None else None
    if batch is None:
        return cu_seqlens_to_runs(cu_seqlens.tolist(), seq_len)
    table = batch.notes.of(DocumentTable)
    known = table.get(cu_seqlens)
    if known is None:
        known = table[cu_seqlens] = {}
    # Others may look at another part of the storage, or have written into it since.
    part = (int(cu_seqlens.storage_offset()), cu_seqlens.numel(), cu_seqlens._version, seq_len)
    if part not in known:
        known[part] = cu_seqlens_to_runs(cu_seqlens.tolist(), seq_len)
    return known[part]
