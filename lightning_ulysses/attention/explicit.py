"""Attention by its formula, for features that ``scaled_dot_product_attention`` lacks: softcap, sinks and ALiBi.

Queries are processed in blocks. The scores of a block are recomputed in the backward, so memory grows with S, not with
S * S.

Sources: softcap, Gemma 2 (arXiv 2408.00118); sinks, transformers ``models/gpt_oss/modeling_gpt_oss.py``; ALiBi, arXiv
2108.12409, with the sign and the distance of flash-attn's ``alibi_slopes``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Bound at import: heads of one rank are no slice of the sequence, whose draws are taken over.
from torch.nn.functional import dropout as _dropout
from torch.utils.checkpoint import checkpoint

# Queries in a block: the scores of one block exist at a time.
_BLOCK = 512


@dataclass(frozen=True)
class Extras:
    """Changes of the scores besides scaling and masking.

    Args:
        softcap: Replaces each score s by softcap * tanh(s / softcap).
        sinks: (H,) one additional score for each head. It takes part in the softmax but has no value.
        alibi_slopes: (H,) slope * distance between query and key is subtracted from the scores.
    """

    softcap: float | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None

    def __bool__(self) -> bool:
        return self.softcap is not None or self.sinks is not None or self.alibi_slopes is not None

    def heads(self, heads: slice) -> Extras:
        """The extras of some of the query heads."""
        sinks, slopes = (None if t is None else t[heads] for t in (self.sinks, self.alibi_slopes))
        return Extras(self.softcap, sinks, slopes)


def _by_group(tensor: Tensor, heads: int) -> Tensor:
    """(H,) -> (heads, H / heads, 1, 1), to go with scores (B, heads, H / heads, S_q, S_k)."""
    # (H,) -> (heads, H / heads, 1, 1)
    return tensor.view(heads, -1, 1, 1)


def _hide(scores: Tensor, mask: Tensor | None, distance: Tensor | None) -> Tensor:
    """Masks scores (B, heads, H / heads, S_q, S_k): by ``mask``, and where ``distance`` (S_q, S_k) is negative."""
    if mask is not None:
        # (B | 1, H | 1, S_q, S_k) or (S_q, S_k) -> (B | 1, heads | 1, H / heads | 1, S_q, S_k)
        mask = mask[(None,) * (4 - mask.dim())]
        mask = mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (scores.shape[1], -1))
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores if distance is None else scores.masked_fill(distance < 0, float("-inf"))


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    offset: int,
    scale: float,
    dropout_p: float,
    extras: Extras,
) -> Tensor:
    """One block of queries: q (B, H, S_q, D), k (B, heads, S_k, D), v (B, heads, S_k, D_v) -> (B, H, S_q, D_v)."""
    heads, length = k.shape[1], q.shape[2]
    # Query heads that share a key head become rows of one matrix product:
    # (B, H, S_q, D) -> (B, heads, H / heads, S_q, D) -> (B, heads, H / heads * S_q, D)
    rows = q.unflatten(1, (heads, -1)).flatten(2, 3)
    # (B, heads, H / heads * S_q, S_k) -> (B, heads, H / heads, S_q, S_k)
    scores = (rows @ k.transpose(2, 3)).unflatten(2, (-1, length)).to(torch.promote_types(q.dtype, torch.float32))
    scores = scores * scale
    if extras.softcap is not None:
        scores = extras.softcap * torch.tanh(scores / extras.softcap)
    # (S_q, S_k) index of the query minus index of the key, both counted among the keys.
    distance = torch.arange(offset, offset + length, device=q.device)[:, None] - torch.arange(
        k.shape[2], device=q.device
    )
    if extras.alibi_slopes is not None:
        scores = scores - _by_group(extras.alibi_slopes, heads) * distance.abs()
    scores = _hide(scores, mask, distance if causal else None)
    if extras.sinks is not None:
        # A further column in the softmax, dropped afterwards: it has no value.
        # (H,) -> (heads, H / heads, 1, 1) -> (B, heads, H / heads, S_q, 1)
        sink = _by_group(extras.sinks, heads).to(scores.dtype).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    weights = _dropout(weights.to(v.dtype), dropout_p)
    # (B, heads, H / heads, S_q, S_k) -> (B, heads, H / heads * S_q, S_k)
    rows = weights.flatten(2, 3)
    # (B, heads, H / heads * S_q, D_v) -> (B, heads, H / heads, S_q, D_v) -> (B, H, S_q, D_v)
    return (rows @ v).unflatten(2, (-1, length)).flatten(1, 2)


def explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    extras: Extras,
    causal: bool = False,
    mask: Tensor | None = None,
    offset: int = 0,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Softmax attention with `Extras`.

    Args:
        q: (B, H, S_q, D).
        k: (B, heads, S_k, D). The number of heads divides H.
        v: (B, heads, S_k, D_v).
        extras: Changes of the scores.
        causal: Query i sees keys up to i + ``offset``.
        mask: (..., S_q, S_k). Floats are added to the scores; a bool is True where a query sees a key.
        offset: Index of the first query among the keys.
        scale: Scale of the scores; 1 / sqrt(D) if None.
        dropout_p: Dropout probability of the attention weights.

    Returns:
        (B, H, S_q, D_v).
    """
    outputs = []
    for begin in range(0, q.shape[2], _BLOCK):
        end = min(begin + _BLOCK, q.shape[2])
        # Causal queries of this block see no later keys, so those are left out of the product.
        seen = min(end + offset, k.shape[2]) if causal else k.shape[2]
        rows = None if mask is None else mask[..., begin:end, :seen]
        outputs.append(
            checkpoint(
                _block,
                q[:, :, begin:end],
                k[:, :, :seen],
                v[:, :, :seen],
                rows,
                causal,
                begin + offset,
                q.shape[-1] ** -0.5 if scale is None else scale,
                dropout_p,
                extras,
                use_reentrant=False,
                preserve_rng_state=dropout_p > 0,
            )
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
