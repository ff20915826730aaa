"""A GPU's choice of kernels on a CPU: stand-ins with the signatures and the limits of the real ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def bytes_kept(function: Any, *args: Any, **kwargs: Any) -> int:
    """Bytes of the memory that a forward keeps for its backward."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(*args, **kwargs)
    return sum(saved.values())


class CudaSdpa:
    """``scaled_dot_product_attention`` with CUDA's choice of a kernel (torch ``sdp_utils.cpp``).

    Attributes:
        chosen: The kernels so far.
        cudnn: For each call, whether cuDNN was allowed.
    """

    def __init__(self) -> None:
        self.chosen: list[str] = []
        self.cudnn: list[bool] = []

    def choose(self, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> str:
        """Flash takes neither masks nor float32, and the efficient kernel no groups of heads."""
        half = q.dtype in (torch.float16, torch.bfloat16)
        if half and settings.get("attn_mask") is None and q.shape[3] == v.shape[3] <= 256:
            return "flash"
        return "math" if settings.get("enable_gqa") else "efficient"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        self.chosen.append(self.choose(q, k, v, **settings))
        self.cudnn.append(torch.backends.cuda.cudnn_sdp_enabled())
        if self.chosen[-1] != "math":
            return scaled_dot_product_attention(q, k, v, **settings)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        scores = q @ k.transpose(2, 3) * (settings.get("scale") or q.shape[3] ** -0.5)
        if settings.get("is_causal"):
            scores = scores.masked_fill(torch.ones(scores.shape[2:], dtype=torch.bool).triu(1), -math.inf)
        if settings.get("attn_mask") is not None:
            scores = scores.masked_fill(~settings["attn_mask"], -math.inf)
        return scores.softmax(-1) @ v


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, edges: Tensor, window: tuple[int, int], scale: float | None, **extras: Any
) -> Tensor:
    """What a variable-length kernel computes: q (tokens, H, D), k and v (tokens, heads, D) -> (tokens, H, D)."""
    left, right = (len(q) if side is None or side < 0 else side for side in window)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    place = torch.arange(len(q))
    number = torch.bucketize(place, edges[1:], right=True)
    distance = place[:, None] - place
    keep = (number[:, None] == number) & (distance <= left) & (distance >= -right)
    # (tokens, H, D) -> (H, tokens, D)
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    scores = q @ k.transpose(1, 2) * (q.shape[2] ** -0.5 if scale is None else scale)
    if extras.get("softcap"):
        scores = torch.tanh(scores / extras["softcap"]) * extras["softcap"]
    if extras.get("alibi_slopes") is not None:
        scores = scores - extras["alibi_slopes"].to(scores)[:, None, None] * distance.abs()
    scores = scores.masked_fill(~keep, -math.inf)
    sinks = extras.get("sinks")
    if sinks is not None:
        # (H,) -> (H, tokens, 1)
        scores = torch.cat([scores, sinks.to(scores)[:, None, None].expand(-1, len(place), 1)], dim=-1)
    weights = scores.softmax(-1)[..., : len(place)]
    return (weights @ v).transpose(0, 1)


class TorchVarlen:
    """torch's ``varlen_attn``, which has no kernel for CPUs.

    Attributes:
        calls: The number of documents of each call.
    """

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        assert cu_seq_q.dtype == torch.int32 and int(cu_seq_q[-1]) == len(q) and max_q == int(cu_seq_q.diff().max())
        assert enable_gqa == (q.shape[1] != k.shape[1]) and cu_seq_k is cu_seq_q and max_k == max_q
        # Documents are the second axis of the kernel's grid.
        assert len(cu_seq_q) - 1 <= 65_535
        self.calls.append(len(cu_seq_q) - 1)
        if max_q == 1:
            # (tokens, heads, D) -> (tokens, H, D): a token that sees itself alone.
            return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        return varlen_attention(q, k, v, cu_seq_q, window_size, scale)


def _is_gpu(tensor: Tensor) -> bool:
    # No mock: it would remember, and so keep, every tensor that it was called with.
    return True


@contextmanager
def gpu_paths() -> Iterator[tuple[TorchVarlen, CudaSdpa]]:
    """Has attention take the paths of a GPU with flash attention, on stand-ins.

    float64 counts as half precision there, so that results can be compared exactly.
    """
    varlen, sdpa = TorchVarlen(), CudaSdpa()
    attention = "lightning_ulysses.attention"
    with (
        mock.patch(f"{attention}.device.is_gpu", _is_gpu),
        mock.patch(f"{attention}.device.has_flash", lambda tensor: tensor.dtype != torch.float32),
        mock.patch(f"{attention}.packed._varlen", return_value=varlen),
        mock.patch(f"{attention}.kernel._sdpa", sdpa),
        mock.patch(f"{attention}.kernel.sdpa_kernel_name", sdpa.choose),
    ):
        yield varlen, sdpa
