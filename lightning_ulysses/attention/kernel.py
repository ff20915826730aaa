"""One call of an attention kernel: queries and keys of one document, or of a memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Bound at import, before anything is patched, so that it calls the kernel and not the interceptor.
from torch.nn.functional import scaled_dot_product_attention as _sdpa

from lightning_ulysses.attention.explicit import Extras, explicit_attention

# The CPU kernel reads k and v once for each block of queries. It is faster if each head is contiguous in memory. From
# about this many keys on, the gain (1 to 7 percent) exceeds the cost of the copy.
_COPY_FROM = 512

# Up to this many keys, the CPU kernel is faster in float32. In bfloat16 it takes 2.6 times as long on 64 keys, and
# equally long on about 400.
_SINGLE_UP_TO = 384


@dataclass(frozen=True)
class Kernel:
    """The arguments that are the same for all kernel calls of one attention call.

    Args:
        scale: Scale of the scores; 1 / sqrt(D) if None.
        dropout_p: Dropout probability of the attention weights.
        extras: Features that ``scaled_dot_product_attention`` lacks. With any of them, attention is computed by its
            formula.
    """

    scale: float | None
    dropout_p: float
    extras: Extras | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False, mask: Tensor | None = None, offset: int = 0
    ) -> Tensor:
        """Computes q (B, H, S_q, D), k (B, heads, S_k, D), v (B, heads, S_k, D_v) -> (B, H, S_q, D_v)."""
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
        # With fewer key/value heads, the kernel shares each among its group of query heads.
        gqa = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        dtype = q.dtype
        # After the exchange, heads are strided views of one buffer.
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
    """Softmax attention to a memory: keys that are not part of the sequence, such as those of a text.

    Args:
        q: (B, H, S_r, D).
        k: (B, heads, S_k, D).
        v: (B, heads, S_k, D_v).
        scale: Scale of the scores; 1 / sqrt(D) if None.
        dropout_p: Dropout probability of the attention weights.
        mask: (B | 1, H | 1, S_r | 1, S_k). Floats are added to the scores; a bool is True where a query sees a key.
        extras: Softcap, sinks and ALiBi.

    Returns:
        (B, H, S_r, D_v).
    """
    if mask is not None:
        # (B | 1, H | 1, S_r | 1, S_k) -> (B | 1, H | 1, S_r, S_k)
        mask = mask.expand(*mask.shape[:2], q.shape[2], k.shape[2])
    return Kernel(scale, dropout_p, extras)(q, k, v, mask=mask)
