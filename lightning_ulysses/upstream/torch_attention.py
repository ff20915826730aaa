"""The private parts of torch's attention that this package uses, pinned by a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_NAMES = {0: "math", 1: "flash", 2: "efficient", 3: "cuDNN"}


def sdpa_kernel_name(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> str:
    """The kernel that ``scaled_dot_product_attention`` takes for a call: math, flash, efficient or cuDNN.

    Args:
        q: (B, H, S_q, D).
        k: (B, heads, S_k, D).
        v: (B, heads, S_k, D_v).
        **settings: The further arguments of the call.

    Source:
        torch ``aten/src/ATen/native/transformers/attention.cpp``, ``_fused_sdp_choice``.
    """
    choice = int(torch._fused_sdp_choice(q, k, v, **settings))
    return _NAMES.get(choice, f"number {choice}")


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Takes cuDNN out of the kernels of ``scaled_dot_product_attention``, beside what the user has switched off."""
    cuda: Any = torch.backends.cuda
    before = cuda.cudnn_sdp_enabled()
    cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        cuda.enable_cudnn_sdp(before)
