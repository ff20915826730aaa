"""Makes ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` call ``scaled_dot_product_attention``.

They do so except in two cases. PyTorch has a fused inference path, which is switched off while a strategy is set up.
And ``need_weights=True``, the default, asks for attention weights. While a sequence is split, None is returned in place
of the weights, and the output is the same.

Masks of the whole sequence do not fit the slices that these modules see: one that stands for them takes their place.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from lightning_ulysses.attention.call_mask import BiasTable, covers_sequence, local_mask_error, whole_keys
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.patching.handle import Handle

_MASKS = ("attn_mask", "key_padding_mask")


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
        place, batch = context.place, context.split
        # Packed documents on one rank: nothing is exchanged here, and the weights stay available.
        if batch is None and not place.takes_calls:
            return original(*args, **kwargs)
        call = signature.bind(*args, **kwargs)
        call.arguments["need_weights"] = False
        if batch is not None:
            _stand_in(batch, context.mesh.sp_rank, call.arguments)
        return original(*call.args, **call.kwargs)

    handle = Handle()
    handle.patch(functional, "multi_head_attention_forward", multi_head_attention_forward)
    if context.mesh.sp_size > 1:
        enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        handle.add(lambda: torch.backends.mha.set_fastpath_enabled(enabled))
    return handle


def _stand_in(batch: LocalBatch, rank: int, arguments: dict[str, Any]) -> None:
    """Replaces the masks of an exchanged call by one of the shape that the function expects of a slice."""
    query, key, mask, padded = (arguments.get(name) for name in ("query", "key", *_MASKS))
    if mask is None and padded is None:
        return
    # Queries (S_r, B, E) and keys of a slice.
    if not isinstance(query, Tensor) or query.dim() != 3 or not isinstance(key, Tensor):
        return
    seen = batch.across(len(query), len(key), rank)
    if len(key) != seen.key_layout.shares[rank]:
        return
    # (S_r, S_k) in the memory of one element, which the function passes on as it is.
    stand_in = query.new_zeros(()).expand(len(query), len(key))
    # With the hint alone, the function drops the mask.
    if not arguments.get("is_causal") or padded is not None:
        batch.notes.of(BiasTable)[stand_in] = _whole(seen, mask, padded, query, arguments["num_heads"])
        arguments["is_causal"] = False
    arguments |= {"attn_mask": stand_in, "key_padding_mask": None}


def _whole(batch: LocalBatch, mask: Tensor | None, padded: Tensor | None, query: Tensor, heads: int) -> Tensor:
    """(B | 1, H | 1, S_q | 1, S): a bool that is True where a query sees a key, or floats that are added to scores."""
    parts = []
    if mask is not None:
        # (S_q, S) or (B * H, S_q, S)
        if not covers_sequence(mask, batch):
            raise local_mask_error(mask, batch)
        # (B * H, S_q, S) -> (B, H, S_q, S), or (S_q, S) -> (1, 1, S_q, S)
        parts.append(mask.unflatten(0, (-1, heads)) if mask.dim() == 3 else mask[None, None])
    if padded is not None:
        keys = whole_keys(padded, batch.key_layout)
        if keys is None:
            raise local_mask_error(padded, batch)
        # (B, S) -> (B, 1, 1, S)
        parts.append(keys[:, None, None])
    # Here True hides a key, unlike in scaled_dot_product_attention.
    if all(part.dtype == torch.bool for part in parts):
        hidden = parts[0] if len(parts) == 1 else parts[0] | parts[1]
        return ~hidden
    floats = [
        torch.zeros_like(part, dtype=query.dtype).masked_fill(part, float("-inf")) if part.dtype == torch.bool else part
        for part in parts
    ]
    return floats[0] if len(floats) == 1 else floats[0] + floats[1]
