"""All documents in one call of torch's variable-length kernel, on CUDA in half precision.

Elsewhere `attend` makes one call for each document. On a GPU, short documents would leave most of it idle.

Source: torch ``nn/attention/varlen.py``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_ulysses.attention.kernel import Kernel
from lightning_ulysses.geometry.layout import Runs

# Arguments that older versions of the kernel lack.
_NEEDED = ("window_size", "scale", "enable_gqa")


@functools.lru_cache(maxsize=1)
def _varlen() -> Callable[..., Any] | None:
    """The kernel of torch below its interceptor; None if this version of torch lacks it or an argument of it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    function: Callable[..., Any] = inspect.unwrap(varlen_attn)
    return function if set(_NEEDED) <= set(inspect.signature(function).parameters) else None


def _has_kernel(q: Tensor) -> bool:
    """Whether the kernel supports the device and precision of ``q``: flash attention needs Ampere or newer."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    return half and q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) >= (8, 0)


def fits(q: Tensor, v: Tensor, kernel: Kernel, rows: list[tuple[Runs, Runs | None]]) -> bool:
    """Whether one kernel call can compute all documents: without padding masks or features that the kernel lacks.

    Args:
        q: (B, H, S, D).
        v: (B, heads, S, D_v).
        kernel: The arguments of the attention call.
        rows: Documents and kept keys of each row, or of the first row if all are equal.
    """
    unpadded = all(valid is None for _, valid in rows)
    plain = not kernel.extras and not kernel.dropout_p and q.shape[3] == v.shape[3]
    # Head sizes that flash attention supports.
    fitting = q.shape[3] % 8 == 0 and q.shape[3] <= 256
    return unpadded and plain and fitting and _has_kernel(q) and _varlen() is not None


def attend_packed(q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, rows: list[Runs], window: tuple[int, int]) -> Tensor:
    """Attention within documents, by one kernel call.

    Args:
        q: (B, H, S, D).
        k: (B, heads, S, D). The number of heads divides H.
        v: (B, heads, S, D).
        kernel: The arguments of the attention call.
        rows: The documents of each row, or of the first row if all are equal.
        window: Number of keys before and after its own that a query sees; -1 for all.

    Returns:
        (B, H, S, D).
    """
    function = _varlen()
    assert function is not None
    batch, _, length, _ = q.shape
    all_rows = rows if len(rows) == batch else rows * batch
    # The kernel takes one sequence, so the rows are concatenated and documents counted through.
    ends = [row * length + end for row, documents in enumerate(all_rows) for _, end in documents]
    longest = max(end - begin for documents in all_rows for begin, end in documents)
    # Pinned memory: a copy from pageable memory would wait for everything that is queued on the GPU.
    edges = torch.tensor([0, *ends], dtype=torch.int32)
    edges = edges.pin_memory().to(q.device, non_blocking=True) if q.device.type == "cuda" else edges
    # (B, heads, S, D) -> (B, S, heads, D) -> (B * S, heads, D)
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    settings: dict[str, Any] = {"scale": kernel.scale, "enable_gqa": q.shape[1] != k.shape[1], "window_size": window}
    out: Tensor = function(q, k, v, edges, edges, longest, longest, **settings)
    # (B * S, H, D) -> (B, S, H, D) -> (B, H, S, D)
    return out.unflatten(0, (batch, length)).transpose(1, 2)
