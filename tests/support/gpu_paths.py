"""A GPU's choice of kernels on a CPU: stand-ins with the signatures and the limits of the real ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightning_ulysses.attention.fused_extras import FusedExtras


def bytes_kept(function: Any, *args: Any, **kwargs: Any) -> int:
    """Bytes of the memory that a forward keeps for its backward."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(*args, **kwargs)
    return sum(saved.values())


class Flex:
    """The compiled ``flex_attention``, which computes what the blocks of its mask say and no gradient on CPUs.

    Attributes:
        calls: The shapes of the queries of each call.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        score_mod: Any,
        block_mask: Any,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_aux: Any = None,
    ) -> Any:
        ratio = q.shape[1] // k.shape[1]
        assert enable_gqa == (ratio > 1) and not ratio & (ratio - 1)
        self.calls.append(tuple(q.shape))
        k, v = (t.repeat_interleave(ratio, dim=1) for t in (k, v))
        place = torch.arange(q.shape[2])
        # Indices of row, head, query and key, as the functions get them.
        grid = (
            torch.arange(len(q))[:, None, None, None],
            torch.arange(q.shape[1])[:, None, None],
            place[:, None],
            place,
        )
        scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
        if score_mod is not None:
            scores = score_mod(scores, *grid)
        keep = self._keep(block_mask, grid, q.shape[2])
        scores = scores.masked_fill(~keep, -math.inf)
        # A query that sees no key gets zeros, as from the kernel.
        out = scores.masked_fill(~keep.any(-1, keepdim=True), 0).softmax(-1).masked_fill(~keep, 0) @ v
        if return_aux is None:
            return out
        assert return_aux.lse
        return out, SimpleNamespace(lse=scores.logsumexp(-1))

    @staticmethod
    def _keep(mask: Any, grid: Any, length: int) -> Tensor:
        assert mask.seq_lengths == (length, length)
        size, _ = mask.BLOCK_SIZE
        seen = mask.mask_mod(*grid)
        keep = torch.zeros_like(seen)
        for row in range(len(seen)):
            at = min(row, len(mask.kv_indices) - 1)
            for block in range(mask.kv_indices.shape[2]):
                queries = slice(block * size, (block + 1) * size)
                partial = mask.kv_indices[at, 0, block, : mask.kv_num_blocks[at, 0, block]]
                whole = mask.full_kv_indices[at, 0, block, : mask.full_kv_num_blocks[at, 0, block]]
                for index, is_whole in [*((each, False) for each in partial), *((each, True) for each in whole)]:
                    keys = slice(int(index) * size, (int(index) + 1) * size)
                    keep[row, :, queries, keys] = True if is_whole else seen[row, :, queries, keys]
        return keep


class CudaSdpa:
    """``scaled_dot_product_attention`` with CUDA's choice of a kernel (torch ``sdp_utils.cpp``).

    Attributes:
        chosen: The kernels so far.
        cudnn: For each call, whether cuDNN was allowed.
        flex: The kernel for extras.
    """

    def __init__(self) -> None:
        self.chosen: list[str] = []
        self.cudnn: list[bool] = []
        self.flex = Flex()

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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edges: Tensor,
    window: tuple[int, int],
    scale: float | None,
    key_edges: Tensor | None = None,
    **extras: Any,
) -> Tensor:
    """What a variable-length kernel computes: q (tokens, H, D), k and v (key tokens, heads, D) -> (tokens, H, D).

    Windows and causal masks are aligned at the last query and the last key of each document.
    """
    key_edges = edges if key_edges is None else key_edges
    left, right = (len(k) if side is None or side < 0 else side for side in window)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    place = key_place = torch.arange(len(q))
    number = key_number = torch.bucketize(place, edges[1:], right=True)
    if key_edges is not edges:
        key_place = torch.arange(len(k))
    distance = place[:, None] - key_place
    if key_edges is not edges:
        key_number = torch.bucketize(key_place, key_edges[1:], right=True)
        # Counted from the ends of the documents.
        distance = distance + (key_edges - edges)[1:][number][:, None]
    keep = (number[:, None] == key_number) & (distance <= left) & (distance >= -right)
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
    weights = scores.softmax(-1)[..., : len(key_place)]
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
        assert enable_gqa == (q.shape[1] != k.shape[1])
        if cu_seq_k is cu_seq_q:
            assert max_k == max_q and len(k) == len(q)
        else:
            assert int(cu_seq_k[-1]) == len(k) and max_k == int(cu_seq_k.diff().max())
        # Documents are the second axis of the kernel's grid.
        assert len(cu_seq_q) - 1 <= 65_535
        self.calls.append(len(cu_seq_q) - 1)
        if max_q == max_k == 1:
            # (tokens, heads, D) -> (tokens, H, D): a token that sees itself alone.
            return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        return varlen_attention(q, k, v, cu_seq_q, window_size, scale, cu_seq_k)


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
        mock.patch(f"{attention}.kept.is_gpu", _is_gpu),
        mock.patch(f"{attention}.fused_extras._flex", side_effect=lambda: sdpa.flex),
        mock.patch(f"{attention}.fused_extras._KNOWN", FusedExtras()),
        mock.patch(f"{attention}.kernel.sdpa_kernel_name", sdpa.choose),
    ):
        yield varlen, sdpa
