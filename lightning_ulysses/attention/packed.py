"""All documents in one call of a variable-length kernel, on CUDA in half precision.

Elsewhere `attend` makes one call for each document. On a GPU, short documents would leave most of it idle.

Source: torch ``nn/attention/varlen.py``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_ulysses.attention import device
from lightning_ulysses.attention.document_calls import DocumentCall, calls_on
from lightning_ulysses.attention.kernel import Kernel, recurs
from lightning_ulysses.attention.kernel_report import note_kernel
from lightning_ulysses.attention.rows import Row, tokens_of
from lightning_ulysses.geometry.layout import Runs
from lightning_ulysses.geometry.mask_spec import MaskSpec

# Arguments that older versions of the kernel lack.
_NEEDED = ("window_size", "scale", "enable_gqa")


class VariableLength(Protocol):
    """A kernel for documents one after another."""

    @property
    def name(self) -> str:
        """For the log."""

    def lacks(self, q: Tensor, v: Tensor, kernel: Kernel) -> str | None:
        """What the kernel lacks for a call, or None if it can compute it.

        Args:
            q: (B, H, S, D).
            v: (B, heads, S, D_v).
            kernel: The arguments of the attention call.
        """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, call: DocumentCall, window: tuple[int, int], kernel: Kernel
    ) -> Tensor:
        """Computes q (tokens, H, D), k and v (key tokens, heads, D) -> (tokens, H, D).

        Args:
            q: The queries.
            k: The keys.
            v: The values.
            call: The documents.
            window: Number of keys before and after its own that a query sees; -1 for all. Causal without any after it.
                The last query of a document is that of its last key.
            kernel: The arguments of the attention call.
        """


@functools.lru_cache(maxsize=1)
def _varlen() -> Callable[..., Any] | None:
    """The kernel of torch below its interceptor; None if this version of torch lacks it or an argument of it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    function: Callable[..., Any] = inspect.unwrap(varlen_attn)
    return function if set(_NEEDED) <= set(inspect.signature(function).parameters) else None


def has_varlen() -> bool:
    """Whether this version of torch has a variable-length kernel with all arguments that are needed."""
    return _varlen() is not None


def lacks_shape(q: Tensor, v: Tensor) -> str | None:
    """What rules out flash attention by device, precision or head size, or None."""
    if not device.has_flash(q):
        return f"{q.dtype} on {q.device.type}; flash attention needs half precision and Ampere or newer"
    if q.shape[3] != v.shape[3]:
        return f"values of another size than keys, {v.shape[3]} and {q.shape[3]}"
    # Head sizes that flash attention supports.
    return None if q.shape[3] % 8 == 0 and q.shape[3] <= 256 else f"a head size of {q.shape[3]}"


class TorchVarlen:
    """``torch.nn.attention.varlen.varlen_attn``."""

    name = "torch's variable-length flash kernel"

    def lacks(self, q: Tensor, v: Tensor, kernel: Kernel) -> str | None:
        """See `VariableLength`."""
        if kernel.extras:
            return "softcap, sinks or ALiBi"
        if kernel.dropout_p:
            return "attention dropout"
        return lacks_shape(q, v) or (
            None if _varlen() is not None else f"torch {torch.__version__} without varlen_attn"
        )

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, call: DocumentCall, window: tuple[int, int], kernel: Kernel
    ) -> Tensor:
        """See `VariableLength`."""
        function = _varlen()
        assert function is not None
        settings: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1], "window_size": window}
        out: Tensor = function(
            q, k, v, call.edges, call.key_edges, call.longest, call.longest_key, scale=kernel.scale, **settings
        )
        return out


def variable_length(
    q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, rows: list[Row], spec: MaskSpec, flash: VariableLength | None
) -> VariableLength | None:
    """The variable-length kernel that computes a call; None if calls for each document are better, or needed.

    Args:
        q: (B, H, S_q, D), a run of the queries.
        k: (B, heads, S, D).
        v: (B, heads, S, D_v).
        kernel: The arguments of the attention call.
        rows: Documents and kept keys of each row, or of the first row if all are equal.
        spec: The keys that each query sees.
        flash: The kernel that the caller prefers.
    """
    if not device.is_gpu(q):
        return None
    most = max(len(documents) for documents, _ in rows)
    is_masked = any(valid not in (None, ((0, k.shape[2]),)) for _, valid in rows)
    is_run, lacking = q.shape[2] < k.shape[2], None
    # With keys after that of the last query, the kernel would count from the wrong end.
    looks_ahead = is_run and spec.reach is not None and not spec.causal
    for function in (flash, TorchVarlen()) if flash is not None else (TorchVarlen(),):
        lacking = "a padding mask" if is_masked else function.lacks(q, v, kernel)
        lacking = "a window on both sides of fewer queries than keys" if looks_ahead else lacking
        if lacking is None:
            # One document of a recurring length: cuDNN is faster than flash attention, and its plan is built once.
            if function is flash or most > 1 or spec.reach is not None or is_run or not recurs(q.shape[2]):
                note_kernel(q, function.name)
                return function
            return None
    if most > 1 or spec.reach is not None or (is_run and spec.causal):
        note_kernel(q, "calls for each document or block of a window", f"{lacking} rules out one call for all of them")
    return None


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Kernel,
    rows: list[Runs],
    window: tuple[int, int],
    function: VariableLength | None = None,
    first: int = 0,
) -> Tensor:
    """Attention within documents, by one kernel call or, with very many or very different documents, by several.

    Args:
        q: (B, H, S_q, D), a run of the queries.
        k: (B, heads, S, D). The number of heads divides H.
        v: (B, heads, S, D).
        kernel: The arguments of the attention call.
        rows: The documents of each row, or of the first row if all are equal.
        window: Number of keys before and after its own that a query sees; -1 for all.
        function: The variable-length kernel; torch's by default.
        first: The key of the first query.

    Returns:
        (B, H, S_q, D).
    """
    function = function or TorchVarlen()
    batch, length = q.shape[0], q.shape[2]
    # The kernel takes one sequence, so the rows are concatenated and documents counted through.
    calls, seen = calls_on(rows, batch, (first, first + length), window[1] == 0, q.device)
    # (B, heads, S_q, D) -> (B, S_q, heads, D) -> (B * S_q, heads, D)
    q = q.transpose(1, 2).flatten(0, 1)
    # (B, heads, S, D) -> (key tokens, heads, D), without those that no query sees
    k, v = (_joined(t, seen) for t in (k, v))
    queries = q.split([call.tokens for call in calls]) if len(calls) > 1 else (q,)
    # One split and not several slices: the backward of a split is one concatenation.
    keys, values = (t.split([call.key_tokens for call in calls]) if len(calls) > 1 else (t,) for t in (k, v))
    outputs = [
        function(queries[number], keys[number], values[number], call, window, kernel)
        for number, call in enumerate(calls)
    ]
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    # (B * S_q, H, D) -> (B, S_q, H, D) -> (B, H, S_q, D)
    return out.unflatten(0, (batch, length)).transpose(1, 2)


def _joined(tensor: Tensor, seen: Runs) -> Tensor:
    """The tokens of each row that are seen, one row after another; ``seen`` of the first row if all are equal."""
    if len(seen) == 1:
        # (B, heads, S, D) -> (B, tokens, heads, D) -> (B * tokens, heads, D)
        return tokens_of(tensor, *seen[0]).transpose(1, 2).flatten(0, 1)
    # B times (heads, S, D) -> (tokens, heads, D)
    rows = [row[:, slice(*run)].transpose(0, 1) for row, run in zip(tensor, seen, strict=True)]
    return torch.cat(rows)
