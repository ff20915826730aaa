"""Intercepts ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ulysses.attention.stand_in import probe_attention
from lightning_ulysses.attention.ulysses import covers_sequence, local_mask_error, sees_memory, sharded_attention
from lightning_ulysses.context import LiveBatch, SequenceState
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.mask_spec import MaskSpec
from lightning_ulysses.interceptors.transformers.masks import find_mask
from lightning_ulysses.patching.early_bound import rebind
from lightning_ulysses.patching.handle import Handle


def _read_mask(batch: LiveBatch, mask: Tensor, spec: MaskSpec) -> tuple[MaskSpec, Tensor | None]:
    """What a mask tensor means over the whole sequence: the spec it was made from, or a bias beside ``spec``."""
    known = find_mask(batch, mask)
    if known is not None:
        return known, None
    if covers_sequence(mask, batch.layout):
        return spec, mask
    raise local_mask_error(mask, batch.layout)


def _wrap(state: SequenceState, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @state.takes_over(original)
    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if state.probing:
            return probe_attention(state, query, key, value)
        batch = state.described_batch
        whole = state.mesh.sp_size == 1
        if batch is None or (whole and (attn_mask is None or find_mask(batch, attn_mask) is None)):
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if sees_memory(state, query, key, is_causal):
            return original(query, key, value, attn_mask, dropout_p, scale=scale, enable_gqa=enable_gqa)
        spec = MaskSpec(is_causal, num_padding=batch.layout.num_padding)
        bias = None
        if attn_mask is not None:
            spec, bias = _read_mask(batch, attn_mask, spec)
        if query.dim() not in (3, 4):
            raise UlyssesError(
                f"scaled_dot_product_attention on a query of shape {tuple(query.shape)}",
                "(B, H, S_r, D) or (H, S_r, D)",
                "reshape to four dimensions, or put attention along another dimension into unsharded()",
            )
        q, k, v = (t if t.dim() == 4 else t.unsqueeze(0) for t in (query, key, value))
        out = sharded_attention(state, q, k, v, spec, scale=scale, dropout_p=dropout_p, bias=bias)
        return out if query.dim() == 4 else out.squeeze(0)

    return scaled_dot_product_attention


def install(state: SequenceState, root: nn.Module | None = None) -> Handle:
    """Routes calls made on a live batch through the exchange; every other call goes to the original.

    Args:
        state: The strategy's state.
        root: The user's LightningModule, in which references to the function are looked for.

    Returns:
        A handle whose ``remove()`` restores the original function.
    """
    functional: Any = torch.nn.functional
    original = functional.scaled_dot_product_attention
    replacement = _wrap(state, original)
    handle = Handle()
    handle.patch(functional, "scaled_dot_product_attention", replacement)
    if root is not None and state.mesh.sp_size > 1:
        rebind(handle, root, original, replacement)
    return handle
