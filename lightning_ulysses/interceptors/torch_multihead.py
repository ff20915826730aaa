"""Keeps ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` on the path that is intercepted.

Both reach ``scaled_dot_product_attention`` except in two cases: PyTorch's fused inference path, which is switched off
while a strategy is set up, and attention weights (``need_weights=True``, the default). Nobody gets those: None comes
back in their place, and the output is the same.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from lightning_ulysses.context import SequenceState
from lightning_ulysses.patching.handle import Handle


def install(state: SequenceState) -> Handle:
    """Guards ``torch.nn.functional.multi_head_attention_forward``.

    Args:
        state: The strategy's state.

    Returns:
        A handle whose ``remove()`` restores the function and the fused path.
    """
    functional: Any = torch.nn.functional
    original = functional.multi_head_attention_forward
    signature = inspect.signature(original)

    @state.takes_over(original)
    def multi_head_attention_forward(*args: Any, **kwargs: Any) -> Any:
        if state.sharded_batch is None and not state.probing:
            return original(*args, **kwargs)
        call = signature.bind(*args, **kwargs)
        call.arguments["need_weights"] = False
        return original(*call.args, **call.kwargs)

    handle = Handle()
    handle.patch(functional, "multi_head_attention_forward", multi_head_attention_forward)
    if state.mesh.sp_size > 1:
        enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        handle.add(lambda: torch.backends.mha.set_fastpath_enabled(enabled))
    return handle
