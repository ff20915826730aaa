"""The learned bias of T5 and its relatives, which depends on the distance of two tokens.

A block computes it from the lengths of queries and keys, and hands it to the next ones. On a slice it is computed for
the whole sequence, and a tensor with one element goes from block to block in its place. The bias between a decoder and
an encoder is zero in these models.

Source: transformers ``T5Attention.compute_bias``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ulysses.attention.call_mask import BiasTable
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.notes import StorageTable
from lightning_ulysses.patching.handle import Handle

_LENGTHS = ["query_length", "key_length"]


class ZeroTable(StorageTable[bool]):
    """A note on a batch: whether a bias is zero, so that only the first layer reads it."""


def with_position_bias(
    batch: LocalBatch, position_bias: Tensor | None, mask: Tensor | None, *, is_split: bool
) -> Tensor | None:
    """The bias of a call, from a position bias and a mask of the whole sequence.

    Args:
        batch: As the call sees it.
        position_bias: (B | 1, H, S_r, S_k) as the model passes it on.
        mask: (..., S_q, S) bool or float, or None.
        is_split: Whether the call is one of a slice.

    Raises:
        UlyssesError: For a bias of a slice that is not zero.
    """
    if position_bias is None:
        return mask
    whole = batch.notes.of(BiasTable).get(position_bias)
    if whole is None and is_split:
        zeros = batch.notes.of(ZeroTable)
        if zeros.get(position_bias) is None:
            zeros[position_bias] = not bool(position_bias.detach().any())
        if zeros.get(position_bias):
            return mask
        raise UlyssesError(
            f"a position bias of shape {tuple(position_bias.shape)} that was computed on a slice",
            "one that the model computes by compute_bias(query_length, key_length), or none",
            "pass it as a mask of the whole sequence, or train without sequence parallelism (sp_size=1)",
        )
    whole = position_bias if whole is None else whole
    if mask is None:
        return whole
    return whole.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else whole + mask


def install(context: SequenceContext, root: nn.Module, handle: Handle) -> None:
    """Replaces ``compute_bias`` of the classes below ``root`` that have it."""
    for kind in {type(module) for module in root.modules()}:
        function = getattr(kind, "compute_bias", None)
        if callable(function) and [*inspect.signature(function).parameters][1:3] == _LENGTHS:
            handle.patch(kind, "compute_bias", _whole(context, function))


def _whole(context: SequenceContext, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @context.takes_over(original)
    def compute_bias(module: nn.Module, query_length: int, key_length: int, *args: Any, **kwargs: Any) -> Tensor:
        batch, rank = context.split, context.mesh.sp_rank
        if context.place.trial is not None or batch is None or query_length != key_length:
            return original(module, query_length, key_length, *args, **kwargs)
        layout = batch.layout
        if query_length != layout.shares[rank]:
            return original(module, query_length, key_length, *args, **kwargs)
        # (1, H, S, S)
        whole = original(module, layout.seq_len, layout.seq_len, *args, **kwargs)
        # (1, H, S_r, S_r) in the memory of one element
        stand_in = whole.detach().new_zeros(()).expand(*whole.shape[:2], query_length, key_length)
        batch.notes.of(BiasTable)[stand_in] = whole
        return stand_in

    return compute_bias
