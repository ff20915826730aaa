"""Which kernel of attention runs for a model's shapes, found by running it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ulysses.attention.attend import attend
from lightning_ulysses.diagnosis.finding import Finding
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.heads import head_layout
from lightning_ulysses.geometry.mask_spec import MaskSpec
from lightning_ulysses.geometry.query_runs import most_ulysses

# Kernels by a part of their operator's name. "math" keeps S x S scores for the backward.
_NAMES = {
    "cudnn_attention": "cuDNN",
    "flash_attention_for_cpu": "torch's flash kernel for CPUs",
    "varlen_attn": "torch's variable-length kernel",
    "flash_attn": "flash-attn",
    "flash_attention": "torch's flash kernel",
    "efficient_attention": "torch's memory-efficient kernel",
    "attention_math": "math",
    "overrideable": "the device's own kernel",
}
_MATH = (
    "it keeps S x S scores: use bfloat16, a head size of at most 256 and no mask tensor, or expect it at short S only"
)


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def _kernel(names: list[str]) -> str:
    for name in names:
        for part, said in _NAMES.items():
            if part in name:
                return said
    # The math kernel is made of plain operators, none of which has a name of its own.
    return "math"


def kernels(
    heads: int, kv_heads: int, head_dim: int, dtype: str, sp_size: int, device: torch.device, seq_len: int = 1024
) -> list[Finding]:
    """The kernel of a causal call, of one with a sliding window and of packed documents.

    Args:
        heads: H.
        kv_heads: H_kv.
        head_dim: D.
        dtype: Such as ``"bfloat16"``.
        sp_size: P; each rank computes its share of the heads.
        device: Where to run.
        seq_len: S.

    Raises:
        UlyssesError: For a dtype that is none, or heads that do not fit.
    """
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise UlyssesError(f"--dtype {dtype}", "a floating point type of torch", "use bfloat16, float16 or float32")
    if sp_size < 1 or not 1 <= kv_heads <= heads or heads % kv_heads:
        raise UlyssesError(
            f"{heads} heads, {kv_heads} key/value heads and sp_size={sp_size}",
            "key/value heads that divide the heads, and at least one rank",
            "correct --heads, --kv_heads or --sp_size",
        )
    # Of more ranks than heads, some hold the same ones.
    layout = head_layout(heads, kv_heads, most_ulysses(heads, sp_size))
    # Rank 0 has the most heads.
    (first, last), (kv_first, kv_last) = layout.query_ranges[0], layout.kv_ranges[0]
    index = layout.uneven_groups[0]
    half = seq_len // 2
    specs = {
        "causal": MaskSpec(causal=True),
        "window": MaskSpec(causal=True, window=max(1, seq_len // 8)),
        "packed": MaskSpec(causal=True, documents=(((0, half), (half, seq_len)),)),
    }
    shape = f"{heads}/{kv_heads} heads of {head_dim} in {dtype}, P={sp_size}, on {device.type}"

    def run(spec: MaskSpec) -> Finding:
        q, k, v = (
            torch.randn(1, count, seq_len, head_dim, dtype=kind, device=device, requires_grad=True)
            for count in (last - first, kv_last - kv_first, kv_last - kv_first)
        )
        operators = _Operators()
        try:
            with operators:
                attend(q, k, v, spec, kv_index=index)
        except (RuntimeError, NotImplementedError) as failure:
            return Finding("kernel", f"none runs: {failure}", "choose another dtype or head size")
        return Finding("", _kernel(operators.names))

    found = []
    for name, spec in specs.items():
        finding = run(spec)
        mend = finding.mend or (_MATH if finding.found == "math" and device.type != "cpu" else None)
        found.append(Finding(f"kernel, {name}", f"{finding.found} ({shape})", mend))
    return found
