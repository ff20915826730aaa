"""Values of a mask that is known only by its spec, for submodules that run on the joined sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ulysses.attention.attend import visible
from lightning_ulysses.attention.mask_table import MaskTable
from lightning_ulysses.attention.rows import rows_of
from lightning_ulysses.context import LocalBatch
from lightning_ulysses.geometry.mask_spec import MaskSpec
from lightning_ulysses.notes import StorageTable


class MaskDtypes(StorageTable[torch.dtype]):
    """A note on a batch: the dtype that a known mask has in one process. Floats are added to scores."""


def is_stand_in(tensor: Tensor) -> bool:
    """Whether a tensor is one element in the shape of a mask."""
    # A dimension of one entry keeps a stride.
    steps = (stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    return tensor.dim() == 4 and tensor.numel() > 1 and not any(steps)


def whole_values(mask: object, batch: LocalBatch) -> object:
    """A known mask of a slice (B, 1, S_r, S_r) -> the mask of one process (B, 1, S, S); anything else as it is."""
    if not isinstance(mask, Tensor) or not is_stand_in(mask):
        return mask
    spec, dtype = batch.notes.of(MaskTable).get(mask), batch.notes.of(MaskDtypes).get(mask)
    # Not between two sequences of their own lengths.
    is_own = mask.shape[-2] == mask.shape[-1] in (*batch.layout.shares, batch.layout.seq_len)
    return mask if spec is None or dtype is None or not is_own else _values(spec, dtype, mask, batch.layout.real_len)


def _values(spec: MaskSpec, dtype: torch.dtype, mask: Tensor, length: int) -> Tensor:
    spec, rows = spec.unpadded(length), mask.shape[0]
    seen = visible(spec, rows_of(spec, rows, length), length, 0, length, mask.device)
    if dtype is not torch.bool:
        seen = torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(~seen, torch.finfo(dtype).min)
    # (B | 1, 1, S, S) -> (B, 1, S, S)
    return seen.expand(rows, -1, -1, -1)
