"""Intercepts the functions of flash-attn 2 and 3, and xformers' ``memory_efficient_attention``.

Neither is needed or imported: only where the user's program has imported it are its functions replaced, wherever they
are held. While a sequence is split, the package's own kernels compute what they would.

Sources: flash-attn ``flash_attn_interface.py``, ``hopper/flash_attn_interface.py``; xformers ``ops/fmha/__init__.py``.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_ulysses.attention.attend import MaskSpec
from lightning_ulysses.attention.early_bound import rebind
from lightning_ulysses.attention.stand_in import keep_apart
from lightning_ulysses.attention.ulysses import covers_sequence, document_runs, local_mask_error, sharded_attention
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.handle import Handle
from lightning_ulysses.state import LiveBatch, SequenceState

_FLASH_MODULES = ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn_interface")
_XFORMERS_MODULES = ("xformers.ops", "xformers.ops.fmha")
# Arguments that change the result, and stand for nothing as long as they are false.
_UNSUPPORTED = (
    "alibi_slopes",
    "qv",
    "softcap",
    "attention_chunk",
    "return_attn_probs",
    "return_softmax",
    "block_table",
    "page_table",
    "seqused_q",
    "seqused_k",
    "leftpad_k",
)
Arguments = dict[str, Any]


def _refuse(name: str, what: str, expected: str) -> UlyssesError:
    return UlyssesError(
        f"{name} with {what}",
        expected,
        "leave it out, call lightning_ulysses.ulysses_attention, or train without sequence parallelism (sp_size=1)",
    )


def _mask(name: str, given: Arguments, batch: LiveBatch) -> MaskSpec:
    """What ``causal`` and ``window_size`` mean; only windows that end at the query itself."""
    for key in _UNSUPPORTED:
        value = given.get(key)
        if isinstance(value, Tensor) or value:
            raise _refuse(name, key, "plain softmax attention")
    left, right = (-1 if side is None else side for side in given.get("window_size") or (-1, -1))
    causal = bool(given.get("causal")) or (left >= 0 and right == 0)
    if not causal and (left >= 0 or right >= 0):
        raise _refuse(name, f"window_size={(left, right)}", "a causal window, or none")
    return MaskSpec(causal, left + 1 if left >= 0 else None, num_padding=batch.layout.num_padding)


def _tensors(given: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each (..., S_r, H, D)."""
    if "qkv" in given:
        # (..., S_r, 3, H, D) -> 3 times (..., S_r, H, D)
        q, k, v = given["qkv"].unbind(-3)
    elif "kv" in given:
        q, (k, v) = given["q"], given["kv"].unbind(-3)
    else:
        q, k, v = given["q"], given["k"], given["v"]
    return q, k, v


def _documents(name: str, given: Arguments, batch: LiveBatch, rank: int) -> tuple[Any, ...]:
    edges: Any = given.get("cu_seqlens", given.get("cu_seqlens_q"))
    others: Any = given.get("cu_seqlens_k", edges)
    length, share = batch.layout.seq_len, batch.layout.shares[rank]
    tokens = _tensors(given)[0].shape[0]
    runs = document_runs(edges, length) if tokens == share else None
    same = others is edges or (runs is not None and document_runs(others, length) == runs)
    # One document more than it names: it ends before the row does, and only padding may lie there.
    is_short = runs is not None and len(runs) >= edges.numel() and not batch.layout.num_padding
    if runs is None or not same or is_short:
        raise UlyssesError(
            f"{name} on {tokens} tokens with cu_seqlens of shape {tuple(edges.shape)}, in a step of S={length}",
            f"this rank's {share} tokens of one row, and the cu_seqlens of the whole row for queries and keys",
            "pass batch['cu_seqlens'] as the collate function made it",
        )
    return (runs,)


def _flash(state: SequenceState, original: Callable[..., Any]) -> Callable[..., Any]:
    signature, name = inspect.signature(original), original.__name__
    packed = "varlen" in name

    @state.takes_over(original)
    def attention(*args: Any, **kwargs: Any) -> Any:
        batch = state.sharded_batch
        if batch is None and not state.probing:
            return original(*args, **kwargs)
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        # (B, S_r, H, D) or, packed, (S_r, H, D) -> (B, H, S_r, D)
        q, k, v = (t.transpose(-3, -2) for t in _tensors(given))
        if batch is None or state.probing:
            return keep_apart(q, k, v).transpose(-3, -2).contiguous()
        spec = _mask(name, given, batch)
        if packed:
            documents = _documents(name, given, batch, state.mesh.sp_rank)
            spec = MaskSpec(spec.causal, spec.window, documents, None, spec.num_padding)
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        out = sharded_attention(
            state, q, k, v, spec, scale=given.get("softmax_scale"), dropout_p=given.get("dropout_p") or 0.0
        )
        # (B, H, S_r, D) -> (B, S_r, H, D) or, packed, (S_r, H, D)
        out = out.transpose(1, 2).contiguous()
        return out.squeeze(0) if packed else out

    return attention


def _xformers(state: SequenceState, original: Callable[..., Any]) -> Callable[..., Any]:
    @state.takes_over(original)
    def memory_efficient_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Any = None,
        p: float = 0.0,
        scale: float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        batch = state.sharded_batch
        if (batch is None and not state.probing) or query.dim() == 5:
            if batch is not None:
                raise _refuse("memory_efficient_attention", "grouped heads (5 dimensions)", "(B, S_r, H, D)")
            return original(query, key, value, attn_bias, p, scale, **kwargs)
        # (B, S_r, H, D), or (B, S_r, D) for one head -> (B, H, S_r, D)
        q, k, v = (t.transpose(1, 2) if t.dim() == 4 else t.unsqueeze(1) for t in (query, key, value))
        if batch is None or state.probing:
            out = keep_apart(q, k, v)
        else:
            causal = type(attn_bias).__name__ == "LowerTriangularMask"
            if not (causal or attn_bias is None or isinstance(attn_bias, Tensor)):
                raise _refuse("memory_efficient_attention", f"attn_bias of type {type(attn_bias).__name__}", "a tensor")
            bias = attn_bias if isinstance(attn_bias, Tensor) else None
            if bias is not None and not covers_sequence(bias, batch.layout):
                raise local_mask_error(bias, batch.layout)
            spec = MaskSpec(causal, num_padding=batch.layout.num_padding)
            out = sharded_attention(state, q, k, v, spec, scale=scale, dropout_p=p, bias=bias)
        # (B, H, S_r, D) -> (B, S_r, H, D)
        return out.transpose(1, 2).contiguous() if query.dim() == 4 else out.squeeze(1)

    return memory_efficient_attention


def install(state: SequenceState, root: nn.Module) -> Handle:
    """Replaces what has been imported, where P > 1.

    Args:
        state: The strategy's state.
        root: The user's LightningModule, in which references to the functions are looked for.

    Returns:
        A handle whose ``remove()`` restores everything.
    """
    handle = Handle()
    found: dict[Callable[..., Any], Callable[..., Any]] = {}
    for names, make in ((_FLASH_MODULES, _flash), (_XFORMERS_MODULES, _xformers)):
        for module in (sys.modules[name] for name in names if name in sys.modules):
            for name, function in list(vars(module).items()):
                wanted = name.startswith("flash_attn_") and name.endswith("_func") and "kvcache" not in name
                if (wanted or name == "memory_efficient_attention") and inspect.isfunction(function):
                    found.setdefault(function, make(state, function))
    if state.mesh.sp_size > 1:
        for original, replacement in found.items():
            rebind(handle, root, original, replacement)
    return handle
