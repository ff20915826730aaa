"""Attention whose queries grow with their position, which Llama 4 counts from the length of its cache.

On a slice, the layer gets a cache that holds nothing, but is as long as what lies before the slice.

Source: transformers ``Llama4TextAttention.forward``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_ulysses.context import SequenceContext
from lightning_ulysses.patching.handle import Handle

_NAMES = ("cache", "past_key_values", "past_key_value")


class _Before:
    """A cache without keys.

    Args:
        length: The tokens before the slice.
    """

    def __init__(self, length: int) -> None:
        self._length = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return keys, values


def _hook(context: SequenceContext, module: nn.Module, name: str) -> Callable[..., Any]:
    signature = inspect.signature(module.forward)

    def supply(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch = context.split
        if batch is None:
            return None
        bound = signature.bind(*args, **kwargs)
        if bound.arguments.get(name) is not None:
            return None
        bound.arguments[name] = _Before(batch.layout.starts[context.mesh.sp_rank])
        return bound.args, bound.kwargs

    return supply


def install(context: SequenceContext, root: nn.Module, handle: Handle) -> None:
    """Hooks every such layer below ``root``."""
    for module in root.modules():
        if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
            continue
        parameters = inspect.signature(module.forward).parameters
        name = next((each for each in _NAMES if each in parameters), None)
        if name is not None:
            handle.add(module.register_forward_pre_hook(_hook(context, module, name), with_kwargs=True).remove)
