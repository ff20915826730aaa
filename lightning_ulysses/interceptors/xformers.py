"""Intercepts xformers' ``memory_efficient_attention``.

No package is needed or imported: only where the user's program has imported it is its function replaced, wherever it is
held. While a sequence is split, our kernels compute what its own would.

Source: xformers ``ops/fmha/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_ulysses.attention.stand_in import probe_attention
from lightning_ulysses.attention.ulysses import covers_sequence, local_mask_error, sees_memory, sharded_attention
from lightning_ulysses.context import SequenceState
from lightning_ulysses.geometry.mask_spec import MaskSpec
from lightning_ulysses.interceptors.flash_attn import refuse, replace_imported
from lightning_ulysses.patching.handle import Handle

_MODULES = ("xformers.ops", "xformers.ops.fmha")


def _wrap(state: SequenceState, original: Callable[..., Any]) -> Callable[..., Any]:
    @state.takes_over(original)
    def memory_efficient_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Any = None,
        p: float = 0.0,
        scale: float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        batch = state.sharded_batch
        if (batch is None and not state.probing) or query.dim() == 5:
            if batch is not None:
                raise refuse("memory_efficient_attention", "grouped heads (5 dimensions)", "(B, S_r, H, D)")
            return original(query, key, value, attn_bias, p, scale, **kwargs)
        # (B, S_r, H, D), or (B, S_r, D) for one head -> (B, H, S_r, D)
        q, k, v = (t.transpose(1, 2) if t.dim() == 4 else t.unsqueeze(1) for t in (query, key, value))
        if batch is None or state.probing:
            out = probe_attention(state, q, k, v)
        else:
            causal = type(attn_bias).__name__ == "LowerTriangularMask"
            if not (causal or attn_bias is None or isinstance(attn_bias, Tensor)):
                raise refuse("memory_efficient_attention", f"attn_bias of type {type(attn_bias).__name__}", "a tensor")
            if sees_memory(state, q, k, causal):
                return original(query, key, value, attn_bias, p, scale, **kwargs)
            bias = attn_bias if isinstance(attn_bias, Tensor) else None
            if bias is not None and not covers_sequence(bias, batch.layout):
                raise local_mask_error(bias, batch.layout)
            spec = MaskSpec(causal, num_padding=batch.layout.num_padding)
            out = sharded_attention(state, q, k, v, spec, scale=scale, dropout_p=p, bias=bias)
        # (B, H, S_r, D) -> (B, S_r, H, D)
        return out.transpose(1, 2).contiguous() if query.dim() == 4 else out.squeeze(1)

    return memory_efficient_attention


def install(state: SequenceState, root: nn.Module) -> Handle:
    """Replaces the function where it has been imported and P > 1.

    Args:
        state: The strategy's state.
        root: The user's LightningModule, in which references to the function are looked for.

    Returns:
        A handle whose ``remove()`` restores everything.
    """
    return replace_imported(state, root, _MODULES, lambda name: name == "memory_efficient_attention", _wrap)
