"""The memory that CUDA's attention kernels take while they run, which no tensor shows."""

from __future__ import annotations

from typing import Any


def flash_attention(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that the backward of flash-attn 2 takes besides what it returns; 0 for other operators.

    Queries are summed up in float32, and one number in float32 is kept for each row. With fewer key/value heads than
    query heads, the gradients of keys and values are computed for each query head.

    Source:
        torch ``aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp``, ``mha_bwd``: ``dq_accum``,
        ``softmax_d``, ``dk_expanded`` and ``dv_expanded``.

    Args:
        func: The operator.
        args: Its arguments: the gradient, q (B, H, S_q, D), k and v (B, heads, S_k, D); of a variable-length kernel
            (tokens, heads, D) each.
    """
    name = str(func)
    if "flash_attention_for_cpu_backward" not in name and "varlen_attn_backward" not in name:
        return 0
    # (tokens, heads, D) -> (1, heads, tokens, D)
    q, k, v = (each if each.dim() == 4 else each.transpose(0, 1)[None] for each in args[1:4])
    batch, heads, queries, size = q.shape
    rows = batch * heads * -(-queries // 128) * 128
    expanded = 0 if heads == k.shape[1] else batch * heads * k.shape[2] * (k.shape[3] + v.shape[3]) * k.element_size()
    return 4 * rows * (size + 1) + expanded
