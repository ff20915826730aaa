"""Intercepts ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ulysses.attention.attend import Softmax
from lightning_ulysses.attention.call import AttentionCall
from lightning_ulysses.attention.call_mask import read_mask
from lightning_ulysses.attention.route import intercept
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.mask_spec import MaskSpec
from lightning_ulysses.patching.early_bound import Function
from lightning_ulysses.patching.handle import Handle


def _flat(lead: torch.Size, tensor: Tensor) -> Tensor:
    # (B, ..., H, S_r, D) -> (B, all heads, S_r, D): each of them attends by itself
    return tensor.expand(*lead, *tensor.shape[-3:]).flatten(1, -3)


def _flat_mask(lead: torch.Size, heads: int, mask: Tensor) -> Tensor:
    """A mask that fits (B, ..., H, S, S), with one dimension of heads."""
    mask = mask[(None,) * (len(lead) + 3 - mask.dim())]
    if all(size == 1 for size in mask.shape[1:-2]):
        # (B | 1, 1, ..., S | 1, S) -> (B | 1, 1, S | 1, S)
        return mask.flatten(1, -3)
    return mask.expand(mask.shape[0], *lead[1:], heads, *mask.shape[-2:]).flatten(1, -3)


def _read(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    # Documents of the batch do not count here: the caller decides by its mask what tokens see.
    def meaning(batch: LocalBatch, known: MaskSpec | None) -> Softmax:
        spec = MaskSpec(is_causal, num_padding=batch.layout.num_padding)
        spec, bias = read_mask(batch, known, mask, spec)
        if query.dim() < 3:
            raise UlyssesError(
                f"scaled_dot_product_attention on a query of shape {tuple(query.shape)}",
                "(B, H, S_r, D), (H, S_r, D), or more dimensions before that of heads",
                "reshape to four dimensions, or put attention along another dimension into unsharded()",
            )
        return Softmax(spec, bias, scale, dropout_p)

    def write(out: Tensor) -> Tensor:
        # (B, all heads, S_r, D_v) -> (B, ..., H, S_r, D_v), or (1, H, S_r, D_v) -> (H, S_r, D_v)
        return out.view(*lead, *query.shape[-3:-1], out.shape[-1]) if query.dim() > 4 else out.squeeze(0)

    mask, lead = attn_mask, query.shape[:-3]
    if query.dim() in (2, 4):
        return AttentionCall(query, key, value, meaning, mask, is_causal)
    if query.dim() == 3:
        # (H, S_r, D) -> (1, H, S_r, D)
        q, k, v = (t if t.dim() == 4 else t.unsqueeze(0) for t in (query, key, value))
    else:
        lead = torch.broadcast_shapes(*(t.shape[:-3] for t in (query, key, value)))
        q, k, v = (_flat(lead, t) for t in (query, key, value))
        mask = None if mask is None else _flat_mask(lead, query.shape[-3], mask)
    return AttentionCall(q, k, v, meaning, mask, is_causal, write=write)


def install(context: SequenceContext, early: dict[Function, Function]) -> Handle:
    """Patches the function while a strategy is set up.

    Args:
        context: Tells what is split at this moment.
        early: Takes the replacement of each function that may have been bound early.

    Returns:
        A handle whose ``remove()`` restores the original function.
    """
    functional: Any = torch.nn.functional
    original = functional.scaled_dot_product_attention
    replacement = intercept(context, original, _read)
    handle = Handle()
    handle.patch(functional, "scaled_dot_product_attention", replacement)
    early[original] = replacement
    return handle
