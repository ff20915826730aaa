"""One call of an attention kernel: queries and keys of one document, or of a memory."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Bound at import, before anything is patched, so that it calls the kernel and not the interceptor.
from torch.nn.functional import scaled_dot_product_attention as _sdpa

from lightning_ulysses.attention import device
from lightning_ulysses.attention.explicit import Extras, explicit_attention
from lightning_ulysses.attention.grouped import repeat_heads
from lightning_ulysses.attention.kernel_report import note_kernel
from lightning_ulysses.upstream.torch_attention import sdpa_kernel_name, without_cudnn

# The CPU kernel reads k and v once for each block of queries. It is faster if each head is contiguous in memory. From
# about this many keys on, the gain (1 to 7 percent) exceeds the cost of the copy.
_COPY_FROM = 512

# Up to this many keys, the CPU kernel is faster in float32. In bfloat16 it takes 2.6 times as long on 64 keys, and
# equally long on about 400.
_SINGLE_UP_TO = 384

# cuDNN builds a plan for each new shape, which takes about a second. Lengths that are multiples of this many tokens are
# taken to recur: rows of a constant length, and those of ``pad_to_multiple_of``.
_RECURRING = 1024


def recurs(length: int) -> bool:
    """Whether later batches probably have this length too, so that a plan of cuDNN for it pays."""
    return length % _RECURRING == 0


_MATH = "no fused kernel takes this call, so S x S scores are kept for the backward"


def _groups(q: Tensor, k: Tensor, v: Tensor, settings: dict[str, Any]) -> bool:
    """Whether a fused kernel of a GPU takes fewer key/value heads than query heads.

    The efficient kernel does not, so ``enable_gqa`` would lead to the math kernel, which keeps S x S scores (torch
    ``sdp_utils.cpp``). Flash and cuDNN do, in half precision and without a mask.
    """
    fits = settings["attn_mask"] is None and device.has_flash(q) and q.shape[3] == v.shape[3] <= 256
    return fits and sdpa_kernel_name(q, k, v, enable_gqa=True, **settings) != "math"


@dataclass(frozen=True)
class Kernel:
    """The arguments that are the same for all kernel calls of one attention call.

    Args:
        scale: Scale of the scores; 1 / sqrt(D) if None.
        dropout_p: Dropout probability of the attention weights.
        extras: Features that ``scaled_dot_product_attention`` lacks. With any of them, attention is computed by its
            formula.
        slow: Why no fused kernel takes the extras on a GPU.
    """

    scale: float | None
    dropout_p: float
    extras: Extras | None = None
    slow: str = "softcap, sinks or ALiBi with a bias, or to a memory"

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False, mask: Tensor | None = None, offset: int = 0
    ) -> Tensor:
        """Computes q (B, H, S_q, D), k (B, heads, S_k, D), v (B, heads, S_k, D_v) -> (B, H, S_q, D_v)."""
        if self.extras:
            if device.is_gpu(q):
                note_kernel(q, "its formula", self.slow)
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
        if device.is_gpu(q):
            return self._on_gpu(q, k, v, causal, mask)
        # With fewer key/value heads, the kernel shares each among its group of query heads.
        gqa = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        dtype = q.dtype
        # After the exchange, heads are strided views of one buffer.
        if k.shape[2] >= _COPY_FROM:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        elif dtype == torch.bfloat16 and mask is None and k.shape[2] <= _SINGLE_UP_TO:
            q, k, v = q.float(), k.float(), v.float()
        out = _sdpa(q, k, v, attn_mask=mask, dropout_p=self.dropout_p, is_causal=causal, scale=self.scale, **gqa)
        return out.to(dtype)

    def _on_gpu(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
        settings: dict[str, Any] = {"attn_mask": mask, "dropout_p": self.dropout_p, "is_causal": causal}
        settings["scale"] = self.scale
        is_new = not (recurs(q.shape[2]) and recurs(k.shape[2]))
        with without_cudnn() if is_new else nullcontext():
            if q.shape[1] != k.shape[1]:
                if _groups(q, k, v, settings):
                    settings["enable_gqa"] = True
                else:
                    k, v = (repeat_heads(t, q.shape[1] // t.shape[1]) for t in (k, v))
            name = sdpa_kernel_name(q, k, v, **settings)
            note_kernel(q, f"torch's {name} kernel", _MATH if name == "math" else "")
            out: Tensor = _sdpa(q, k, v, **settings)
        return out


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
