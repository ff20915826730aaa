"""Intercepts ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_ulysses.attention.attend import Softmax
from lightning_ulysses.attention.call import AttentionCall
from lightning_ulysses.attention.call_mask import read_mask
from lightning_ulysses.attention.route import intercept
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.mask_spec import MaskSpec
from lightning_ulysses.patching.early_bound import rebind
from lightning_ulysses.patching.handle import Handle


def _squeeze(out: Tensor) -> Tensor:
    # (1, H, S_r, D_v) -> (H, S_r, D_v)
    return out.squeeze(0)


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
        spec, bias = read_mask(batch, known, attn_mask, spec)
        # More dimensions usually mean attention along another one than the sequence.
        if query.dim() not in (3, 4):
            raise UlyssesError(
                f"scaled_dot_product_attention on a query of shape {tuple(query.shape)}",
                "(B, H, S_r, D) or (H, S_r, D)",
                "reshape to four dimensions, or put attention along another dimension into unsharded()",
            )
        return Softmax(spec, bias, scale, dropout_p)

    if query.dim() != 3:
        return AttentionCall(query, key, value, meaning, attn_mask, is_causal)
    # (H, S_r, D) -> (1, H, S_r, D)
    q, k, v = (t if t.dim() == 4 else t.unsqueeze(0) for t in (query, key, value))
    return AttentionCall(q, k, v, meaning, attn_mask, is_causal, write=_squeeze)


def install(context: SequenceContext, root: nn.Module | None = None) -> Handle:
    """Patches the function while a strategy is set up.

    Args:
        context: Tells what is split at this moment.
        root: The user's LightningModule. References to the function are replaced in it as well.

    Returns:
        A handle whose ``remove()`` restores the original function.
    """
    functional: Any = torch.nn.functional
    original = functional.scaled_dot_product_attention
    replacement = intercept(context, original, _read)
    handle = Handle()
    handle.patch(functional, "scaled_dot_product_attention", replacement)
    if root is not None and context.mesh.sp_size > 1:
        rebind(handle, root, original, replacement)
    return handle
