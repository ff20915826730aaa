"""Intercepts flash-attn 2, 3 and 4, and torch's ``varlen_attn``.

flash-attn is neither required nor imported. If the user's program has imported it, its functions are replaced
everywhere. While a sequence is split, the same attention is computed on the exchanged q, k and v: by the
variable-length kernel of the same version, where it takes the call (`attention.flash`), and else by our kernels.

Sources: flash-attn ``flash_attn_interface.py``, ``hopper/flash_attn_interface.py``, ``flash_attn/cute/interface.py``;
torch ``nn/attention/varlen.py``.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_ulysses.attention.attend import Softmax
from lightning_ulysses.attention.call import AttentionCall
from lightning_ulysses.attention.explicit import Extras
from lightning_ulysses.attention.flash import flash_kernel
from lightning_ulysses.attention.mask_table import document_runs
from lightning_ulysses.attention.route import intercept
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.layout import Runs, SequenceLayout
from lightning_ulysses.geometry.mask_spec import MaskSpec
from lightning_ulysses.patching.early_bound import Function
from lightning_ulysses.patching.handle import Handle

_MODULES = (
    "flash_attn",
    "flash_attn.flash_attn_interface",
    "flash_attn.cute",
    "flash_attn.cute.interface",
    "flash_attn_interface",
    "torch.nn.attention.varlen",
)
# Those of flash-attn, with what the log calls their kernels.
_VERSIONS = {
    "flash_attn": "flash-attn 2",
    "flash_attn.flash_attn_interface": "flash-attn 2",
    "flash_attn.cute": "flash-attn 4",
    "flash_attn.cute.interface": "flash-attn 4",
    "flash_attn_interface": "flash-attn 3",
}
# torch's names of arguments -> flash-attn's names.
_ALIASES = {
    "query": "q",
    "key": "k",
    "value": "v",
    "cu_seq_q": "cu_seqlens_q",
    "cu_seq_k": "cu_seqlens_k",
    "scale": "softmax_scale",
    "is_causal": "causal",
}
# Arguments that change the result. They are accepted only if they are false, empty or None.
_UNSUPPORTED = (
    "qv",
    "attention_chunk",
    "return_attn_probs",
    "return_softmax",
    "return_lse",
    "return_aux",
    "score_mod",
    "mask_mod",
    "block_sparse_tensors",
    "gather_kv_indices",
    "aux_tensors",
    "block_table",
    "page_table",
    "seqused_q",
    "seqused_k",
    "leftpad_k",
)
Arguments = dict[str, Any]


def refuse(name: str, what: str, expected: str) -> UlyssesError:
    """The error for an argument whose meaning over the whole sequence is not certain."""
    return UlyssesError(
        f"{name} with {what}",
        expected,
        "leave it out, call lightning_ulysses.ulysses_attention, or train without sequence parallelism (sp_size=1)",
    )


def _mask(name: str, given: Arguments) -> MaskSpec:
    """The mask that ``causal`` and ``window_size`` describe."""
    for key in _UNSUPPORTED:
        # Tensors count as given: bool() of one fails or reads it from the device.
        value = given.get(key)
        if isinstance(value, Tensor) or (any(value) if isinstance(value, tuple) else value):
            raise refuse(name, key, "plain softmax attention")
    # -1 or None: no limit on this side.
    left, right = (-1 if side is None else side for side in given.get("window_size") or (-1, -1))
    causal = _is_causal(given)
    if not causal and (left >= 0) != (right >= 0):
        raise refuse(name, f"window_size={(left, right)}", "a window that is limited on both sides, or none")
    window, ahead = (left + 1, right) if left >= 0 else (None, None)
    return MaskSpec(causal, window, ahead=ahead)


def _is_causal(given: Arguments) -> bool:
    # A window with no keys after the query is causal as well.
    return bool(given.get("causal")) or (given.get("window_size") or (-1, -1))[1] == 0


def _extras(name: str, given: Arguments) -> Extras | None:
    """Softcap, sinks and ALiBi."""
    slopes = given.get("alibi_slopes")
    if slopes is not None and slopes.dim() != 1:
        raise refuse(name, f"alibi_slopes of shape {tuple(slopes.shape)}", "one slope for each head, (H,)")
    return Extras(given.get("softcap") or None, given.get("s_aux", given.get("learnable_sink")), slopes) or None


def _tensors(given: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each (..., S_r, H, D)."""
    if "qkv" in given:
        # (..., S_r, 3, H, D) -> 3 times (..., S_r, H, D)
        q, k, v = given["qkv"].unbind(-3)
    elif "kv" in given:
        # (..., S_r, 2, H_kv, D) -> 2 times (..., S_r, H_kv, D)
        q, (k, v) = given["q"], given["kv"].unbind(-3)
    else:
        q, k, v = given["q"], given["k"], given["v"]
    return q, k, v


def _documents(name: str, given: Arguments, tokens: int, layout: SequenceLayout, share: int) -> tuple[Runs, ...]:
    """The documents of the whole row, of which the call has ``tokens`` tokens as its slice."""
    edges: Any = given.get("cu_seqlens", given.get("cu_seqlens_q"))
    others: Any = given.get("cu_seqlens_k")
    others = edges if others is None else others
    length = layout.seq_len
    runs = document_runs(edges, length) if tokens == share else None
    same = others is edges or (runs is not None and document_runs(others, length) == runs)
    # `runs` has a document more than `edges` names if `edges` ends before the row. Only padding may be there.
    is_short = runs is not None and len(runs) >= edges.numel() and not layout.num_padding
    if runs is None or not same or is_short:
        raise UlyssesError(
            f"{name} on {tokens} tokens with cu_seqlens of shape {tuple(edges.shape)}, in a step of S={length}",
            f"this rank's {share} tokens of one row, and the cu_seqlens of the whole row for queries and keys",
            "pass batch['cu_seqlens'] as the collate function made it",
        )
    return (runs,)


def _wrap(
    context: SequenceContext,
    original: Callable[..., Any],
    kernels: Mapping[Callable[..., Any], tuple[Callable[..., Any], str]],
) -> Callable[..., Any]:
    """The replacement of a function; ``kernels`` has the variable-length kernel of its version, and the label."""
    signature, name = inspect.signature(original), original.__name__
    packed = "varlen" in name
    kernel, label = kernels.get(original, (None, ""))
    # Versions of flash-attn without this argument always return (output, log-sum-exp).
    pair = name != "varlen_attn" and "return_attn_probs" not in signature.parameters

    def write(out: Tensor) -> Any:
        # (B, H, S_r, D) -> (B, S_r, H, D) or, packed, (S_r, H, D)
        out = out.transpose(1, 2).contiguous()
        out = out.squeeze(0) if packed else out
        return (out, None) if pair else out

    def read(*args: Any, **kwargs: Any) -> AttentionCall:
        # Bound by name, since a caller may pass any argument by position.
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = {_ALIASES.get(key, key): value for key, value in call.arguments.items()}
        # (B, S_r, H, D) or, packed, (S_r, H, D) -> (B, H, S_r, D)
        q, k, v = (t.transpose(-3, -2)[None] if packed else t.transpose(-3, -2) for t in _tensors(given))

        def meaning(batch: LocalBatch, known: MaskSpec | None) -> Softmax:
            spec = replace(_mask(name, given), num_padding=batch.layout.num_padding)
            if packed:
                spec = replace(spec, documents=_documents(name, given, q.shape[2], batch.layout, context.share))
            return Softmax(
                spec,
                scale=given.get("softmax_scale"),
                dropout_p=given.get("dropout_p") or 0.0,
                extras=_extras(name, given),
                flash=flash_kernel(kernel, label, bool(given.get("deterministic"))),
            )

        return AttentionCall(q, k, v, meaning, is_causal=_is_causal(given), takes_memory=not packed, write=write)

    return intercept(context, original, read)


def replace_imported(
    context: SequenceContext,
    early: dict[Function, Function],
    modules: tuple[str, ...],
    is_wanted: Callable[[str], bool],
    wrap: Callable[[SequenceContext, Callable[..., Any]], Callable[..., Any]],
) -> Handle:
    """Replaces functions of imported modules. Does nothing if P = 1.

    Args:
        context: Tells what is split at this moment.
        early: Takes the replacement of each function that may have been bound early.
        modules: Names of modules that may hold the functions.
        is_wanted: Decides by its name whether a function is replaced.
        wrap: Makes the replacement of a function.

    Returns:
        A handle whose ``remove()`` restores everything.
    """
    handle = Handle()
    if context.mesh.sp_size == 1:
        return handle
    found: dict[Function, Function] = {}
    for module in (sys.modules[name] for name in modules if name in sys.modules):
        for name, function in list(vars(module).items()):
            if is_wanted(name) and inspect.isfunction(function):
                # One replacement for each function, however many modules hold it.
                found.setdefault(function, wrap(context, function))
    for original, replacement in found.items():
        # `rebind` leaves torch's own modules alone.
        if original.__module__ == "torch.nn.attention.varlen":
            handle.patch(sys.modules[original.__module__], original.__name__, replacement)
    early |= found
    return handle


def _is_attention(name: str) -> bool:
    # Functions with a key/value cache are for generation, which runs unsharded.
    is_flash = name.startswith("flash_attn_") and name.endswith("_func") and "kvcache" not in name
    return is_flash or name == "varlen_attn"


def _kernels() -> dict[Callable[..., Any], tuple[Callable[..., Any], str]]:
    """For each function of flash-attn the variable-length kernel of the same version, and its label."""
    found: dict[Callable[..., Any], tuple[Callable[..., Any], str]] = {}
    for module, label in _VERSIONS.items():
        held = vars(sys.modules[module]) if module in sys.modules else {}
        kernel = held.get("flash_attn_varlen_func")
        for name, function in held.items():
            if kernel is not None and _is_attention(name) and inspect.isfunction(function):
                found.setdefault(function, (kernel, label))
    return found


def install(context: SequenceContext, early: dict[Function, Function]) -> Handle:
    """Replaces the functions that have been imported. Does nothing if P = 1.

    Args:
        context: Tells what is split at this moment.
        early: Takes the replacement of each function that may have been bound early.

    Returns:
        A handle whose ``remove()`` restores everything.
    """
    import torch.nn.attention.varlen  # noqa: F401  (part of torch: a step may import it later)

    kernels = _kernels()
    return replace_imported(context, early, _MODULES, _is_attention, functools.partial(_wrap, kernels=kernels))
