"""One call of a kernel: queries and keys of one document, or of a memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Bound at import, before anything is patched: this must reach the kernel and not the interceptor.
from torch.nn.functional import scaled_dot_product_attention as _sdpa

from lightning_ulysses.attention.explicit import Extras, explicit_attention

# The CPU kernel reads k and v once per block of queries. From about this many keys on it gains more (1 to 7 percent)
# from heads that lie close together in memory than it costs to move them there.
_COPY_FROM = 512

# The CPU kernel takes up to 2.6 times as long in bfloat16 as in float32 on 64 keys, and as long on about 400.
_SINGLE_UP_TO = 384


@dataclass(frozen=True)
class Kernel:
    """The arguments that every call for one attention call of the model shares.

    Args:
        scale: Of the scores; 1 / sqrt(D) if None.
        dropout_p: Dropout probability of the attention weights.
        extras: What ``scaled_dot_product_attention`` lacks; with any of it, attention goes by its formula.
    """

    scale: float | None
    dropout_p: float
    extras: Extras | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False, mask: Tensor | None = None, offset: int = 0
    ) -> Tensor:
        """From q (B, H, S_q, D), k (B, heads, S_k, D), v (B, heads, S_k, D_v) to (B, H, S_q, D_v)."""
        if self.extras:
            return explicit_attention(
                q,
                k,
                v,
                extras=self.extras,
                causal=causal,
                mask=mask,
                offset=offset,
                scale=self.scale,
                dropout_p=self.dropout_p,
            )
        gqa = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        dtype = q.dtype
        if q.device.type == "cpu" and k.shape[2] >= _COPY_FROM:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        elif q.device.type == "cpu" and dtype == torch.bfloat16 and mask is None and k.shape[2] <= _SINGLE_UP_TO:
            q, k, v = q.float(), k.float(), v.float()
        out = _sdpa(q, k, v, attn_mask=mask, dropout_p=self.dropout_p, is_causal=causal, scale=self.scale, **gqa)
        return out.to(dtype)


def attend_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    mask: Tensor | None = None,
    extras: Extras | None = None,
) -> Tensor:
    """Softmax attention to keys that are no part of the sequence.

    Args:
        q: (B, H, S_r, D).
        k: (B, heads, S_k, D).
        v: (B, heads, S_k, D_v).
        scale: Of the scores; 1 / sqrt(D) if None.
        dropout_p: Dropout probability of the attention weights.
        mask: (B | 1, H | 1, S_r | 1, S_k), added to the scores, or True where a query sees a key.
        extras: Softcap, sinks and ALiBi.

    Returns:
        (B, H, S_r, D_v).
    """
    if mask is not None:
        mask = mask.expand(*mask.shape[:2], q.shape[2], k.shape[2])
    return Kernel(scale, dropout_p, extras)(q, k, v, mask=mask)
