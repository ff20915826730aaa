"""The meaning of the mask tensor of an attention call: over the whole sequence, over keys alone, or none."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_ulysses.context import LocalBatch, current_context
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.gather import join_sequence
from lightning_ulysses.geometry.documents import valid_runs
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.geometry.mask_spec import MaskSpec
from lightning_ulysses.notes import StorageTable


class BiasTable(StorageTable[Tensor]):
    """A note on a batch: the mask of the whole sequence, (B | 1, H | 1, S | 1, S), for each mask that stands for it."""


def covers_sequence(attn_mask: Tensor, batch: LocalBatch) -> bool:
    """Whether a mask covers the whole sequence, (..., S, S), and not only one rank's slice."""
    lengths = (batch.layout.real_len, batch.key_layout.real_len)
    return 2 <= attn_mask.dim() <= 4 and attn_mask.shape[-2:] == lengths


def local_mask_error(attn_mask: Tensor, batch: LocalBatch) -> UlyssesError:
    """The error for a mask tensor made from one rank's slice."""
    queries, real = batch.layout.real_len, batch.key_layout.real_len
    return UlyssesError(
        f"an attention mask of shape {tuple(attn_mask.shape)} inside a step",
        f"no mask tensor, or that of the whole sequence, (..., {queries}, {real}), the same on every rank, or one over "
        f"keys, (..., 1, {real}) or of this rank's slice; one over the queries of a slice makes sense only locally",
        "use is_causal=True, or call lightning_ulysses.ulysses_attention(..., is_causal=, window=, cu_seqlens=)",
    )


def whole_keys(mask: Tensor, layout: SequenceLayout) -> Tensor | None:
    """A mask over keys, (..., S_r) or (..., S), for the whole sequence; None if it is neither. May be a collective."""
    context = current_context()
    length = mask.shape[-1]
    if length in (layout.real_len, layout.seq_len) or context is None:
        return _in_order(mask, layout, -1) if length in (layout.real_len, layout.seq_len) else None
    if length != layout.shares[context.mesh.sp_rank] or context.mesh.sp_group is None:
        return None
    return join_sequence(mask.contiguous(), layout.shares, mask.dim() - 1, context.mesh.sp_group)


def _in_order(mask: Tensor, layout: SequenceLayout, *dims: int) -> Tensor:
    """A mask of two sequences in one, (..., S, S) or (..., S), with tokens in the order of ranks."""
    if layout.parts:
        order = torch.tensor(layout.order, device=mask.device)
        for dim in dims:
            mask = mask.index_select(dim, order)
    return mask


def read_mask(
    batch: LocalBatch, known: MaskSpec | None, mask: Tensor | None, spec: MaskSpec
) -> tuple[MaskSpec, Tensor | None]:
    """The spec and the bias of a call.

    Args:
        batch: The batch that is split.
        known: The spec of a known mask, see `mask_table`.
        mask: The mask tensor of the call: a known one, one of the whole sequence, or one over keys.
        spec: The spec of the call without its mask tensor.

    Raises:
        UlyssesError: For a mask made from the queries of one rank's slice.
    """
    if mask is None:
        return spec, None
    if known is not None:
        return known, None
    stood_for = batch.notes.of(BiasTable).get(mask)
    mask = mask if stood_for is None else stood_for
    # A mask of the whole sequence becomes a bias, of which each rank uses the part of its heads.
    if covers_sequence(mask, batch):
        return spec, _in_order(mask, batch.layout, -2, -1)
    if not 2 <= mask.dim() <= 4 or mask.shape[-2] != 1:
        raise local_mask_error(mask, batch)
    # One copy of what is the same for all heads. (..., 1, S_r) -> (B | 1, H | 1, 1, S_r)
    keys = mask[(None,) * (4 - mask.dim())]
    keys = keys[:, :1] if keys.stride(1) == 0 else keys
    whole = whole_keys(keys, batch.key_layout)
    if whole is None:
        raise local_mask_error(mask, batch)
    if whole.dtype is torch.bool and whole.shape[1] == 1 and whole.shape[0] == batch.rows:
        # (B, 1, 1, S) -> (B, S)
        return replace(spec, valid=valid_runs(whole[:, 0, 0].cpu())), None
    return spec, whole
