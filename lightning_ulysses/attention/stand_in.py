"""A stand-in for attention that keeps tokens apart, to find other layers that mix them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_ulysses.attention.call import AttentionCall
from lightning_ulysses.attention.route import AttentionTally


def keep_apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The output of each token if it saw only itself, plus a trace of its query and key.

    Queries and keys may carry the token's position (rotary embeddings). The trace makes wrong positions visible.

    Args:
        q: (..., H, S, D).
        k: (..., H_kv, S_k, D).
        v: (..., H_kv, S_k, D_v).

    Returns:
        (..., H, S, D_v). If there are more or fewer keys than queries, as in a memory, every token gets their mean.
    """
    # With uneven weights, changes of several entries hardly cancel each other.
    weights = torch.cos(torch.arange(q.shape[-1], device=q.device)).to(q.dtype)
    # (..., H, S, D) -> (..., H, S, 1)
    trace = (q * weights).mean(dim=-1, keepdim=True)
    seen = v + (k * weights).mean(dim=-1, keepdim=True)
    if k.shape[-2] != q.shape[-2]:
        # If the keys are no memory but pooled tokens, a changed token changes all outputs, which the trial notices.
        seen = seen.mean(dim=-2, keepdim=True)
    if k.dim() > 2 and k.shape[-3] != q.shape[-3]:
        # (..., H_kv, S, D_v) -> (..., H, S, D_v)
        seen = seen.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    return seen + trace


@dataclass
class KeepApart:
    """A trial in which every attention call answers by `keep_apart`.

    Args:
        tally: Takes note of a model that attends to a memory.
    """

    tally: AttentionTally

    def answer(self, call: AttentionCall, plain: Callable[[], Any]) -> Any:
        """See `context.Trial`."""
        self.tally.attends_memory |= call.k.shape[-2] != call.q.shape[-2]
        return call.write(keep_apart(call.q, call.k, call.v))
