"""flash-attn's variable-length kernels 2, 3 and 4 on q, k and v as they are after the exchange.

flash-attn is neither required nor imported here: an interceptor hands over the function that the user's program holds.

Sources: flash-attn ``flash_attn_interface.py``, ``hopper/flash_attn_interface.py``, ``flash_attn/cute/interface.py``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_ulysses.attention.document_calls import DocumentCall
from lightning_ulysses.attention.kernel import Kernel
from lightning_ulysses.attention.packed import lacks_shape

# Without these, a function is no variable-length kernel of flash-attn.
_NEEDED = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal")
# flash-attn 4 and forks of 3 have their own names for the argument.
_SINKS = ("learnable_sink", "s_aux")


def flash_kernel(function: Callable[..., Any] | None, label: str, deterministic: bool = False) -> FlashKernel | None:
    """The kernel by its function, or None if the function is missing or has other arguments.

    Args:
        function: ``flash_attn_varlen_func`` of some version.
        label: For the log, such as ``"flash-attn 2"``.
        deterministic: Whether the backward must add in a fixed order.
    """
    if function is None:
        return None
    parameters = inspect.signature(function).parameters
    return FlashKernel(function, label, parameters, deterministic) if set(_NEEDED) <= set(parameters) else None


@dataclass(frozen=True)
class FlashKernel:
    """One version's kernel. Which features it has is read from its arguments.

    Args:
        function: ``flash_attn_varlen_func``.
        label: For the log.
        parameters: The function's.
        deterministic: Whether the backward must add in a fixed order.
    """

    function: Callable[..., Any]
    label: str
    parameters: Mapping[str, inspect.Parameter]
    deterministic: bool = False

    @property
    def name(self) -> str:
        """See `packed.VariableLength`."""
        return f"{self.label}'s variable-length kernel"

    @functools.cached_property
    def _sinks(self) -> str | None:
        return next((name for name in _SINKS if name in self.parameters), None)

    def lacks(self, q: Tensor, v: Tensor, kernel: Kernel) -> str | None:
        """See `packed.VariableLength`."""
        extras = kernel.extras
        if kernel.dropout_p and "dropout_p" not in self.parameters:
            return f"{self.label} without attention dropout"
        if extras and extras.softcap is not None and (kernel.dropout_p or "softcap" not in self.parameters):
            return f"{self.label} without softcap" + " beside dropout" * bool(kernel.dropout_p)
        # The kernels take both as constants: their gradient would be lost.
        constants = {"alibi_slopes": extras.alibi_slopes, self._sinks or "sinks": extras.sinks} if extras else {}
        for argument, tensor in constants.items():
            if tensor is not None and argument not in self.parameters:
                return f"{self.label} without {argument}"
            if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
                return f"{self.label} without gradients of {argument}"
        return lacks_shape(q, v)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, call: DocumentCall, window: tuple[int, int], kernel: Kernel
    ) -> Tensor:
        """See `packed.VariableLength`."""
        causal = window[1] == 0
        settings: dict[str, Any] = {"softmax_scale": kernel.scale, "causal": causal}
        # A causal call has no keys after the query in any case.
        if window[0] >= 0 or (window[1] > 0):
            settings["window_size"] = window
        if kernel.dropout_p:
            settings["dropout_p"] = kernel.dropout_p
        extras = kernel.extras
        if extras and extras.softcap is not None:
            settings["softcap"] = extras.softcap
        if extras and extras.alibi_slopes is not None:
            settings["alibi_slopes"] = extras.alibi_slopes.float()
        if extras and extras.sinks is not None and self._sinks is not None:
            settings[self._sinks] = extras.sinks.to(q.dtype)
        if "deterministic" in self.parameters:
            settings["deterministic"] = self.deterministic or torch.are_deterministic_algorithms_enabled()
        lengths = {"cu_seqlens_q": call.edges, "max_seqlen_q": call.longest}
        lengths |= {"cu_seqlens_k": call.key_edges, "max_seqlen_k": call.longest_key}
        # (tokens, H, D), and from some versions the log-sum-exp beside it
        out = self.function(q, k, v, **lengths, **settings)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result
