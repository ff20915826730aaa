"""Describes the attention masks of transformers models instead of building them.

transformers' functions would build a mask of this rank's slice, with positions counted from the start of the slice.
Here the model gets a tensor with one element in its place. The tensor is a known mask: `MaskTable` holds its `MaskSpec`
of the whole sequence.

Source: transformers ``masking_utils.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_ulysses.attention.mask_table import MaskTable
from lightning_ulysses.attention.whole_mask import MaskDtypes
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.documents import valid_runs
from lightning_ulysses.geometry.mask_spec import MaskSpec
from lightning_ulysses.notes import StorageTable
from lightning_ulysses.patching.handle import Handle

# Functions that combine other mask functions, which they close over.
_COMPOSED = {"and_masks", "remap_positions_for_packed_sequence"}
_KNOWN_MASKS = {
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
    "chunked_overlay",
    "packed_sequence_mask_function",
}

# These masks have the documents that transformers finds in positions; flash-attn finds those that begin at 0.
_PACKED = ("sdpa", "eager", "flex_attention")


@dataclass
class PackedCall:
    """What the running call of a model does in one process, noted by `supply_inputs`.

    Attributes:
        is_found: Whether transformers finds documents in its positions: they are the batch's, and there is no cache.
        is_supplied: Whether the call said nothing of a cache.
    """

    is_found: bool = False
    is_supplied: bool = False


class LeftOut(StorageTable[None]):
    """A note on a run: known masks that one process leaves out, where the calling module says if it is causal."""


def _is_left_out(values: Mapping[str, Any], spec: MaskSpec, length: int) -> bool:
    """Whether transformers' ``sdpa_mask`` returns None in one process."""
    near = values.get("local_size")
    skips = values.get("allow_is_causal_skip") if spec.causal else values.get("allow_is_bidirectional_skip")
    return bool(skips) and spec.valid is None and (near is None or length < near)


def _mask_parts(mask_function: Callable[..., Any]) -> dict[str, Any]:
    """The factory functions of which a mask function is composed, with the values that each closes over."""
    # "sliding_window_overlay.<locals>.inner_mask" -> "sliding_window_overlay"
    name = getattr(mask_function, "__qualname__", type(mask_function).__name__).split(".")[0]
    code = getattr(mask_function, "__code__", None)
    cells = getattr(mask_function, "__closure__", None) or ()
    closed = {key: cell.cell_contents for key, cell in zip(code.co_freevars if code else (), cells, strict=True)}
    if name not in _COMPOSED:
        return {name: closed}
    parts: dict[str, Any] = {}
    for inner in closed.values():
        for function in inner if isinstance(inner, tuple) else (inner,):
            if callable(function):
                parts |= _mask_parts(function)
    return parts


def _spec_from_mask_function(
    mask_function: Callable[..., Any], batch: LocalBatch, has_padding: bool, is_packed: bool
) -> MaskSpec:
    """The spec of a mask function over the whole sequence. Documents and padding come from the layout of the batch."""
    parts = _mask_parts(mask_function)
    unknown = set(parts) - _KNOWN_MASKS
    causal = "causal_mask_function" in parts
    if not causal and "sliding_window_overlay" in parts:
        # It limits only the keys before the query.
        unknown.add("sliding_window_overlay")
    if unknown:
        raise UlyssesError(
            f"an attention mask made of {sorted(unknown)}",
            "causal, bidirectional, sliding-window, chunked or packed-document attention",
            "train this model without sequence parallelism (sp_size=1)",
        )
    layout = batch.layout
    window, ahead = parts.get("sliding_window_overlay", {}).get("sliding_window"), None
    if "sliding_window_bidirectional_overlay" in parts:
        ahead = parts["sliding_window_bidirectional_overlay"]["sliding_window"]
        # `ahead` keys on each side are a window of `ahead` + 1 with the query's own key. The narrower window counts.
        window = min(ahead + 1, window or ahead + 1)
    return MaskSpec(
        causal=causal,
        window=window,
        documents=layout.uncached if is_packed else layout.documents,
        valid=layout.valid if has_padding else None,
        num_padding=layout.num_padding,
        ahead=ahead,
        chunk=parts.get("chunked_overlay", {}).get("chunk_size"),
    )


def install_masks(context: SequenceContext, handle: Handle, names: tuple[str, ...]) -> None:
    """Replaces the mask functions registered under ``names``."""
    from transformers.masking_utils import AttentionMaskInterface

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @context.takes_over(original, outside_regions=True)
        def describe_mask(*args: Any, **kwargs: Any) -> Any:
            is_tried = context.place.trial is not None
            whole = context.awaits_region
            batch = context.place.region or whole
            # Models may use the values of these themselves, which is right where they run on the joined sequence.
            has_values = name in ("sdpa", "eager")
            is_plain = has_values and (context.place.is_joined or (name == "eager" and whole is not None))
            if batch is None or (is_tried and context.mesh.sp_size == 1) or is_plain:
                return original(*args, **kwargs)
            call = inspect.signature(original).bind(*args, **kwargs)
            call.apply_defaults()
            values = {**call.arguments, **call.arguments.get("kwargs", {})}
            # Where the sequence is whole, a mask that cannot be described is built by transformers.
            is_known = _KNOWN_MASKS.issuperset(_mask_parts(values["mask_function"]))
            if is_tried and is_known and not has_values:
                # What answers on a slice takes no mask.
                return None
            if (context.mesh.sp_size == 1 or whole is not None) and not is_known:
                return original(*args, **kwargs)
            # Outside of the regions of a plan, another sequence than the batch may have a mask.
            padding, lengths = values.get("attention_mask"), {values["q_length"], values["kv_length"]}
            is_unpadded = whole is not None and lengths == {whole.layout.real_len}
            is_other = whole is not None and not is_unpadded and lengths != {whole.layout.seq_len}
            if is_other and "packed_sequence_mask_function" in _mask_parts(values["mask_function"]):
                return original(*args, **kwargs)
            running = context.place.batch or batch
            is_packed = padding is None and name in _PACKED and running.notes.of(PackedCall).is_found
            spec = _spec_from_mask_function(values["mask_function"], batch, padding is not None, is_packed)
            if whole is not None and is_unpadded:
                spec = spec.unpadded(whole.layout.real_len)
            if whole is not None and padding is not None:
                # That of an encoder is not that of the decoder.
                spec = replace(spec, valid=valid_runs(padding.cpu()))
            if is_other:
                spec = replace(spec, documents=None, num_padding=0)
            seed = torch.ones(1, dtype=torch.bool, device=values.get("device", "cpu"))
            batch.notes.of(MaskTable)[seed] = spec
            if name == "sdpa" and _is_left_out(values, spec, batch.layout.real_len):
                context.notes.of(LeftOut)[seed] = None
            if has_values:
                batch.notes.of(MaskDtypes)[seed] = torch.bool if name == "sdpa" else values.get("dtype", torch.float32)
            # (1,) -> (1, 1, 1, 1) -> (B, 1, S_r, S_r) in the memory of one element: models may look at the shape.
            return seed.view(1, 1, 1, 1).expand(values["batch_size"], 1, values["q_length"], values["kv_length"])

        return describe_mask

    registry: dict[str, Any] = AttentionMaskInterface._global_mapping
    for name in names:
        if name in registry:
            handle.patch_item(registry, name, wrap(name, registry[name]))
