"""``ulysses_attention``: the explicit call for hand-written models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_ulysses.attention.attend import Softmax, attend
from lightning_ulysses.attention.call import AttentionCall
from lightning_ulysses.attention.call_mask import read_mask
from lightning_ulysses.attention.explicit import Extras
from lightning_ulysses.attention.kernel import attend_memory
from lightning_ulysses.attention.mask_table import document_runs
from lightning_ulysses.attention.route import route
from lightning_ulysses.context import LocalBatch, current_context, eager_while_live
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.documents import read_edges
from lightning_ulysses.geometry.layout import Runs
from lightning_ulysses.geometry.mask_spec import MaskSpec


def _window(window: int | tuple[int, int] | None, is_causal: bool) -> tuple[int | None, int | None]:
    """``window`` and ``ahead`` of a `MaskSpec`, from the argument of `ulysses_attention`."""
    if window is None:
        return None, None
    # An integer counts the query itself, as `MaskSpec.window` does; (left, right) does not.
    left, right = (window - 1, 0) if isinstance(window, int) else window
    if left < 0 or right < 0 or (isinstance(window, int) and not is_causal):
        raise UlyssesError(
            f"window={window} with is_causal={is_causal}",
            "a positive window of a causal attention, or (left, right), how many keys on each side a query sees",
            "set is_causal=True, write window=(left, right), or leave window out",
        )
    return left + 1, right


def _check_per_head(num_heads: int, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != (num_heads,):
            raise UlyssesError(
                f"{name} of shape {tuple(tensor.shape)} for {num_heads} query heads",
                f"one value for each query head of the whole model, ({num_heads},)",
                f"pass {name} of all heads; each rank takes those of its own",
            )


def _documents(q: Tensor, cu_seqlens: Any, batch: LocalBatch | None) -> tuple[Runs, ...]:
    """The documents of the whole row, of which ``q`` is a slice."""
    # cu_seqlens describe one row.
    if q.shape[0] != 1:
        raise UlyssesError(
            f"cu_seqlens with a batch of {q.shape[0]} rows",
            "one row",
            "pack the documents into one row, (1, S), or pass the rows one by one",
        )
    # Tensors stay as they are: their documents are kept for the next layer.
    edges = cu_seqlens if _is_plain(cu_seqlens) else torch.tensor(read_edges("cu_seqlens", cu_seqlens))
    return (document_runs(edges, q.shape[2] if batch is None else batch.layout.seq_len),)


def _is_plain(edges: Any) -> bool:
    return isinstance(edges, Tensor) and edges.dim() == 1 and edges.dtype in (torch.int32, torch.int64)


@eager_while_live
def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    window: int | tuple[int, int] | None = None,
    chunk: int | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    attn_mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Attention for hand-written models. Plain attention if nothing is split.

    Args:
        q: (B, H, S_r, D).
        k: (B, H_kv, S_r, D). H must be a multiple of H_kv.
        v: (B, H_kv, S_r, D_v).
        is_causal: Query i sees keys up to i, counted in the whole sequence.
        scale: Scale of the scores; 1 / sqrt(D) if None.
        dropout_p: Dropout probability of the attention weights.
        window: Sliding window. With ``is_causal``, an integer is the number of keys that a query sees, its own
            included. A pair (left, right) is the number of keys before and after its own.
        chunk: A query sees only keys of its own chunk of so many tokens, counted from the start of each document.
        cu_seqlens: (documents + 1,) cumulative document lengths of the whole sequence, with B = 1. Tokens see only
            their own document.
        attn_mask: (S, S), (H, S, S) or (B | 1, H | 1, S, S) of the whole sequence, the same on every rank. Floats are
            added to the scores; a bool is True where a query sees a key. Each rank uses the part of its heads.
        softcap: Replaces each score s by softcap * tanh(s / softcap), before masking.
        sinks: (H,) one additional score for each head. It takes part in the softmax but has no value.
        alibi_slopes: (H,) slope * distance between query and key is subtracted from the scores.

    Returns:
        (B, H, S_r, D_v).

    Raises:
        UlyssesError: If lengths do not fit the batch that is split, or P > H. Also if ``window``, ``cu_seqlens``, or a
            tensor with one value for each head is invalid.

    Source:
        DeepSpeed-Ulysses, arXiv 2309.14509.
    """
    before, ahead = _window(window, is_causal)
    _check_per_head(q.shape[1], sinks=sinks, alibi_slopes=alibi_slopes)
    # An empty `Extras` is falsy.
    extras = Extras(softcap, sinks, alibi_slopes) or None
    context = current_context()
    batch = context.split if context is not None else None
    spec = MaskSpec(is_causal, before, ahead=ahead, chunk=chunk)
    # A trial may run without a batch, and its stand-in for attention ignores documents.
    if cu_seqlens is not None and (context is None or context.place.trial is None):
        spec = replace(spec, documents=_documents(q, cu_seqlens, batch))
    # (S, S) or (H, S, S) or (B | 1, H | 1, S, S) -> (B | 1, H | 1, S, S)
    bias = attn_mask[(None,) * (4 - attn_mask.dim())] if attn_mask is not None else None

    def plain() -> Tensor:
        return attend(q, k, v, spec, scale=scale, dropout_p=dropout_p, bias=bias, extras=extras)

    def memory() -> Tensor:
        return attend_memory(q, k, v, scale=scale, dropout_p=dropout_p, mask=bias, extras=extras)

    def meaning(batch: LocalBatch, known: MaskSpec | None) -> Softmax:
        # Unlike `spec` alone, it hides the padding that this package added.
        split = replace(spec, num_padding=batch.layout.num_padding)
        split, mask = read_mask(batch, known, attn_mask, split)
        return Softmax(split, mask, scale, dropout_p, extras)

    if context is None:
        return plain()
    call = AttentionCall(q, k, v, meaning, is_causal=is_causal, memory=memory)
    out: Tensor = route(context, context.described, call, plain)
    return out
