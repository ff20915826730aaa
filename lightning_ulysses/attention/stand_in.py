"""Attention that keeps tokens apart, for finding out what else in a model mixes them."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What each token would get if it saw itself alone, and a trace of its query and key, which carry its position.

    Args:
        q: (..., H, S, D).
        k: (..., H_kv, S_k, D).
        v: (..., H_kv, S_k, D_v).

    Returns:
        (..., H, S, D_v). From keys and values of another length, as of a memory, every token gets the same.
    """
    weights = torch.cos(torch.arange(q.shape[-1], device=q.device)).to(q.dtype)
    # (..., H, S, D) -> (..., H, S, 1)
    trace = (q * weights).mean(dim=-1, keepdim=True)
    seen = v + (k * weights).mean(dim=-1, keepdim=True)
    if k.shape[-2] != q.shape[-2]:
        # If they came from the tokens after all, pooled for instance, each would move every other one.
        seen = seen.mean(dim=-2, keepdim=True)
    if k.dim() > 2 and k.shape[-3] != q.shape[-3]:
        # (..., H_kv, S, D_v) -> (..., H, S, D_v)
        seen = seen.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    return seen + trace
