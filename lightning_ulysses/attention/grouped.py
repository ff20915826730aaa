"""Copies key/value heads for kernels that want as many of them as query heads."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor


def repeat_heads(tensor: Tensor, times: int) -> Tensor:
    """Each head ``times`` times, in order: (B, heads, S, D) -> (B, heads * times, S, D)."""
    # (B, heads, S, D) -> (B, heads, times, S, D) -> (B, heads * times, S, D)
    return tensor.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2)


def heads_of(tensor: Tensor, kv_index: tuple[int, ...]) -> Tensor:
    """The key/value head of each query head: (B, heads, S, D) -> (B, H_r, S, D).

    By expanded views and not by an index tensor: that one would have to be copied to the device, and the backward of
    indexing adds in no fixed order there.

    Args:
        tensor: (B, heads, S, D).
        kv_index: For each query head its key/value head. It never falls.
    """
    # Each (B, 1, S, D) -> (B, query heads of this head, S, D)
    parts = [tensor[:, head : head + 1].expand(-1, len([*run]), -1, -1) for head, run in groupby(kv_index)]
    return torch.cat(parts, dim=1)
