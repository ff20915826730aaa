"""Checks the eager attention of transformers models, which every model defines itself.

Some models have no other attention, since ``scaled_dot_product_attention`` lacks softcap (Gemma 2) and sinks (GPT-OSS).
Their function is replaced only if it computes softmax attention. This is tested on the first few tokens.

Source: transformers ``AttentionInterface.get_interface`` and ``eager_attention_forward`` of ``models/*/modeling_*.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ulysses.attention.attend import attend
from lightning_ulysses.attention.explicit import Extras
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.mask_spec import MaskSpec

# Tokens of the comparison.
_TOKENS = 4
Forward = Callable[..., tuple[Tensor, Tensor | None]]


def check_formula(
    original: Forward,
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    extras: Extras | None,
    **kwargs: Any,
) -> None:
    """Compares a model's own function with `attend` on a few tokens.

    Args:
        original: The model's function.
        module: The attention block that calls it.
        q: (B, H, S_r, D).
        k: (B, H_kv, S_r, D).
        v: (B, H_kv, S_r, D_v).
        scale: Scale of the scores.
        extras: Softcap and sinks of the call.
        **kwargs: Further arguments of the call.

    Raises:
        UlyssesError: If the results differ.
    """
    # (B, heads, S_r, D) -> (1, heads, tokens, D)
    q, k, v = (t[:1, :, :_TOKENS].detach() for t in (q, k, v))
    length = q.shape[2]
    # Eager functions are given a mask that is added to the scores. This one is causal.
    hidden = torch.full((length, length), torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device).triu(1)
    bias = kwargs.get("position_bias")
    if bias is not None:
        # (B | 1, H, S_q, S_k) -> (1, H, tokens, tokens), of any values: those of a slice may all be zero.
        bias = torch.linspace(-1, 1, bias.shape[1] * length**2, dtype=q.dtype, device=q.device)
        kwargs["position_bias"] = bias = bias.view(1, -1, length, length)
    with torch.no_grad():
        # The mask (tokens, tokens) -> (1, 1, tokens, tokens)
        theirs = original(module, q, k, v, hidden[None, None], dropout=0.0, scaling=scale, **kwargs)[0]
        # (1, H, tokens, D_v) -> (1, tokens, H, D_v)
        ours = attend(q, k, v, MaskSpec(True), scale=scale, bias=bias, extras=extras).transpose(1, 2)
    bound = 1e-4 if q.dtype in (torch.float32, torch.float64) else 5e-2
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, atol=bound * float(ours.abs().max()), rtol=bound):
        raise UlyssesError(
            f"{type(module).__name__}, whose {getattr(original, '__name__', 'attention')} is not softmax attention",
            "softmax over scaled products of queries and keys, with a softcap or sinks at most",
            "train this model without sequence parallelism (sp_size=1)",
        )
