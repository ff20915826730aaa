"""Intercepts xformers' ``memory_efficient_attention``.

xformers is neither required nor imported. If the user's program has imported it, the function is replaced everywhere.
While a sequence is split, our kernels compute the same attention.

Source: xformers ``ops/fmha/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_ulysses.attention.attend import Softmax
from lightning_ulysses.attention.call import AttentionCall
from lightning_ulysses.attention.call_mask import read_mask
from lightning_ulysses.attention.route import intercept
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.geometry.mask_spec import MaskSpec
from lightning_ulysses.interceptors.flash_attn import refuse, replace_imported
from lightning_ulysses.patching.early_bound import Function
from lightning_ulysses.patching.handle import Handle

_MODULES = ("xformers.ops", "xformers.ops.fmha")


def _read(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    **kwargs: Any,
) -> AttentionCall:
    mask = attn_bias if isinstance(attn_bias, Tensor) else None
    # By name, since xformers is not imported here.
    causal = type(attn_bias).__name__ == "LowerTriangularMask"

    def meaning(batch: LocalBatch, known: MaskSpec | None) -> Softmax:
        if query.dim() == 5:
            raise refuse("memory_efficient_attention", "grouped heads (5 dimensions)", "(B, S_r, H, D)")
        if not (causal or attn_bias is None or mask is not None):
            raise refuse("memory_efficient_attention", f"attn_bias of type {type(attn_bias).__name__}", "a tensor")
        spec = MaskSpec(causal, num_padding=batch.layout.num_padding)
        spec, bias = read_mask(batch, known, mask, spec)
        return Softmax(spec, bias, scale, p)

    def write(out: Tensor) -> Tensor:
        # (B, H, S_r, D) -> (B, S_r, H, D), or (B, S_r, D) for one head
        return out.transpose(1, -2).contiguous() if query.dim() >= 4 else out.squeeze(1)

    # (B, S_r, H, D), or (B, S_r, D) for one head -> (B, H, S_r, D); (B, S_r, G, H, D) -> (B, H, G, S_r, D)
    q, k, v = (t.transpose(1, -2) if t.dim() >= 4 else t.unsqueeze(1) for t in (query, key, value))
    return AttentionCall(q, k, v, meaning, mask, causal, write=write)


def _wrap(context: SequenceContext, original: Callable[..., Any]) -> Callable[..., Any]:
    return intercept(context, original, _read)


def install(context: SequenceContext, early: dict[Function, Function]) -> Handle:
    """Replaces the function if it has been imported. Does nothing if P = 1.

    Args:
        context: Tells what is split at this moment.
        early: Takes the replacement of each function that may have been bound early.

    Returns:
        A handle whose ``remove()`` restores everything.
    """
    return replace_imported(context, early, _MODULES, lambda name: name == "memory_efficient_attention", _wrap)
