"""Makes ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` call ``scaled_dot_product_attention``.

They do so except in two cases. PyTorch has a fused inference path, which is switched off while a strategy is set up.
And ``need_weights=True``, the default, asks for attention weights. While a sequence is split, None is returned in place
of the weights, and the output is the same.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from lightning_ulysses.context import SequenceContext
from lightning_ulysses.patching.handle import Handle


def install(context: SequenceContext) -> Handle:
    """Patches ``torch.nn.functional.multi_head_attention_forward``.

    Args:
        context: Tells what is split at this moment.

    Returns:
        A handle whose ``remove()`` restores the function and the fused path.
    """
    functional: Any = torch.nn.functional
    original = functional.multi_head_attention_forward
    signature = inspect.signature(original)

    @context.takes_over(original)
    def multi_head_attention_forward(*args: Any, **kwargs: Any) -> Any:
        # Packed documents on one rank: nothing is exchanged here, and the weights stay available.
        if context.split is None and context.place.trial is None:
            return original(*args, **kwargs)
        call = signature.bind(*args, **kwargs)
        call.arguments["need_weights"] = False
        return original(*call.args, **call.kwargs)

    handle = Handle()
    handle.patch(functional, "multi_head_attention_forward", multi_head_attention_forward)
    if context.mesh.sp_size > 1:
        enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        handle.add(lambda: torch.backends.mha.set_fastpath_enabled(enabled))
    return handle
