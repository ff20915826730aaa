"""Intercepts Hugging Face transformers: attention, masks, positions, label shift and ``generate``.

Models branch on the *name* of the attention implementation, so the functions registered under ``sdpa`` and
``flash_attention_2`` are replaced while a strategy is set up, and put back afterwards. Masks are described rather than
built: the model passes a one-element tensor around that stands for a `MaskSpec` of the whole sequence.

Sources: transformers ``masking_utils.py``, ``integrations/sdpa_attention.py``, ``integrations/flash_attention.py``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_ulysses.attention.attend import MaskSpec
from lightning_ulysses.attention.sdpa import find_mask, local_mask_error
from lightning_ulysses.attention.ulysses import sharded_attention
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.handle import Handle
from lightning_ulysses.state import LiveBatch, SequenceState, TargetEvidence, join_sequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATIONS = ("sdpa", "flash_attention_2")
_COMPOSED = {"and_masks", "remap_positions_for_packed_sequence"}
_KNOWN_MASKS = {
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "packed_sequence_mask_function",
}
_UNSUPPORTED_FEATURES = ("softcap", "s_aux", "position_bias", "cache")


def _mask_parts(mask_function: Callable[..., Any]) -> dict[str, Any]:
    """The factory functions that a transformers mask function is composed of, with the values they close over."""
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


def _spec_from_mask_function(mask_function: Callable[..., Any], batch: LiveBatch, has_padding: bool) -> MaskSpec:
    """What a mask function means over the whole sequence; documents and padding come from the batch's layout."""
    parts = _mask_parts(mask_function)
    unknown = set(parts) - _KNOWN_MASKS
    if unknown:
        raise UlyssesError(
            f"an attention mask made of {sorted(unknown)}",
            "causal, bidirectional, sliding-window or packed-document attention",
            "train this model without sequence parallelism (sp_size=1)",
        )
    layout = batch.layout
    return MaskSpec(
        causal="causal_mask_function" in parts,
        window=parts.get("sliding_window_overlay", {}).get("sliding_window"),
        documents=layout.documents,
        valid=layout.valid if has_padding else None,
        num_padding=layout.num_padding,
    )


def _install_masks(state: SequenceState, handle: Handle) -> None:
    from transformers.masking_utils import AttentionMaskInterface

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def describe_mask(*args: Any, **kwargs: Any) -> Any:
            batch = state.sharded_batch
            if batch is None:
                return original(*args, **kwargs)
            call = inspect.signature(original).bind(*args, **kwargs)
            call.apply_defaults()
            values = {**call.arguments, **call.arguments.get("kwargs", {})}
            padding = values.get("attention_mask")
            spec = _spec_from_mask_function(values["mask_function"], batch, padding is not None)
            seed = torch.ones(1, dtype=torch.bool, device=values.get("device", "cpu"))
            batch.keep.append(seed)
            batch.masks[seed.untyped_storage().data_ptr()] = spec
            # (1,) -> (B, 1, S_r, S_r) without memory: models may look at a mask's shape.
            return seed.view(1, 1, 1, 1).expand(values["batch_size"], 1, values["q_length"], values["kv_length"])

        return describe_mask

    registry: dict[str, Any] = AttentionMaskInterface._global_mapping
    for name in IMPLEMENTATIONS:
        handle.patch_item(registry, name, wrap(registry[name]))


def _call_spec(batch: LiveBatch, attention_mask: Tensor | None, is_causal: bool, window: int | None) -> MaskSpec:
    layout = batch.layout
    if attention_mask is None:
        return MaskSpec(is_causal, window, layout.documents, None, layout.num_padding)
    spec = find_mask(batch, attention_mask)
    if spec is not None:
        return spec
    shard = batch.shards.get("attention_mask")
    if shard is not None and attention_mask.dim() == 2 and attention_mask.shape == shard.shape:
        return MaskSpec(is_causal, window, layout.documents, layout.valid, layout.num_padding)
    raise local_mask_error(attention_mask)


def _install_attention(state: SequenceState, handle: Handle) -> None:
    from transformers.modeling_utils import AttentionInterface

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def attention_forward(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            dropout: float = 0.0,
            scaling: float | None = None,
            is_causal: bool | None = None,
            **kwargs: Any,
        ) -> tuple[Tensor, None]:
            batch = state.sharded_batch
            if batch is None:
                out: tuple[Tensor, None] = original(
                    module,
                    query,
                    key,
                    value,
                    attention_mask,
                    dropout=dropout,
                    scaling=scaling,
                    is_causal=is_causal,
                    **kwargs,
                )
                return out
            present = [feature for feature in _UNSUPPORTED_FEATURES if kwargs.get(feature) is not None]
            if present:
                raise UlyssesError(
                    f"{type(module).__name__} with {', '.join(present)}",
                    "attention that is plain softmax over queries, keys and values",
                    "train this model without sequence parallelism (sp_size=1)",
                )
            causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
            window = kwargs.get("sliding_window") if name.startswith("flash") and causal else None
            spec = _call_spec(batch, attention_mask, causal, window)
            result = sharded_attention(state, query, key, value, spec, scale=scaling, dropout_p=dropout)
            # (B, H, S_r, D_v) -> (B, S_r, H, D_v)
            return result.transpose(1, 2).contiguous(), None

        return attention_forward

    registry: dict[str, Any] = AttentionInterface._global_mapping
    for name in IMPLEMENTATIONS:
        handle.patch_item(registry, name, wrap(name, registry[name]))


def _install_generate(state: SequenceState, handle: Handle, sync_steps: bool) -> None:
    from transformers import GenerationMixin

    original = GenerationMixin.generate

    @functools.wraps(original)
    def generate(self: Any, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        batch, group = state.sharded_batch, state.mesh.sp_group
        if sync_steps:
            # Under ZeRO-3 every forward gathers parameters, so all ranks must take equally many steps.
            kwargs.setdefault("synced_gpus", True)
        if batch is None or group is None:
            return original(self, inputs, *args, **kwargs)
        named = {key: kwargs.get(key) for key in ("input_ids", "attention_mask", "position_ids", "inputs_embeds")}
        shards = {shard.untyped_storage().data_ptr(): shard for shard in batch.shards.values()}

        def whole(name: str, tensor: Any) -> Any:
            shard = shards.get(tensor.untyped_storage().data_ptr()) if isinstance(tensor, Tensor) else None
            if shard is None:
                return tensor
            if tensor.shape[:2] != shard.shape[:2]:
                raise UlyssesError(
                    f"generate() on {name} of shape {tuple(tensor.shape)}, a part of this rank's slice",
                    "the whole prompt, the same on every rank",
                    "cut the prompt out of lightning_ulysses.gather_sequence(batch['input_ids'])",
                )
            joined = join_sequence(tensor, batch.layout.shares, 1, group)
            return joined[:, : batch.layout.seq_len - batch.layout.num_padding]

        kwargs |= {name: whole(name, tensor) for name, tensor in named.items() if tensor is not None}
        with state.suspended():
            return original(self, whole("inputs", inputs), *args, **kwargs)

    handle.patch(GenerationMixin, "generate", generate)


def check_model(model: PreTrainedModel) -> None:
    """Refuses, before the first step, what cannot be made exact.

    Raises:
        UlyssesError: Naming the model, the reason and the change.
    """
    name, config = type(model).__name__, model.config
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in IMPLEMENTATIONS:
        raise UlyssesError(
            f"{name} with attn_implementation={implementation!r}",
            f"one of {list(IMPLEMENTATIONS)}, since the others attend within this rank's slice only",
            "load the model with attn_implementation='sdpa'",
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UlyssesError(
            f"{name}, an encoder-decoder model",
            "a model with one sequence",
            "train it without sequence parallelism (sp_size=1)",
        )
    if getattr(config, "output_router_logits", False):
        raise UlyssesError(
            f"{name} with output_router_logits=True",
            "a loss that is a mean over tokens; the router's auxiliary loss is not",
            "set config.output_router_logits = False",
        )


def _inject(state: SequenceState, model: PreTrainedModel) -> Callable[..., Any]:
    """A forward pre-hook that supplies the positions and shifted labels that the model would get wrong on a slice."""
    signature = inspect.signature(model.forward)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    name = type(model).__name__
    # transformers falls back to the causal language model's loss where a class has no loss type.
    shifts = (getattr(model, "loss_type", None) or "ForCausalLM").startswith("ForCausalLM")

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch = state.sharded_batch
        if batch is None:
            return None
        given = {**signature.bind_partial(*args, **kwargs).arguments, **kwargs}
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if not isinstance(tokens, Tensor):
            return None
        added: dict[str, Any] = {}
        if given.get("position_ids") is None:
            if "position_ids" not in signature.parameters:
                raise UlyssesError(
                    f"{name}, whose forward takes no position_ids",
                    "a model that can be told the positions of its tokens",
                    "train it without sequence parallelism (sp_size=1)",
                )
            begin = batch.layout.start(state.mesh.sp_rank)
            # (S_r,) -> (1, S_r)
            added["position_ids"] = torch.arange(begin, begin + tokens.shape[1], device=tokens.device).unsqueeze(0)
        if "use_cache" in signature.parameters and given.get("use_cache") is None:
            added["use_cache"] = False
        labels = given.get("labels")
        if isinstance(labels, Tensor):
            added |= _shifted_labels(batch, labels, given, shifts, takes_any, name)
        return (args, {**kwargs, **added}) if added else None

    return hook


def _shifted_labels(
    batch: LiveBatch, labels: Tensor, given: dict[str, Any], shifts: bool, takes_any: bool, name: str
) -> dict[str, Tensor]:
    source = next((key for key in ("labels", "input_ids") if _same(labels, batch.shards.get(key))), None)
    if source is None:
        raise UlyssesError(
            f"labels of shape {tuple(labels.shape)} for {name} that are neither batch['labels'] nor batch['input_ids']",
            "labels that are part of the batch, since the label behind a slice's last token lies on the next rank",
            "make the labels in the collate function and pass batch['labels'] to the model",
        )
    if not shifts:
        batch.evidence.append(TargetEvidence(name=source))
        return {}
    if not takes_any:
        raise UlyssesError(
            f"{name}, which shifts labels inside its forward and takes no shift_labels",
            "a causal language model whose forward passes **kwargs to its loss function",
            "compute the loss in training_step from the logits and batch['shift_labels']",
        )
    shifted = "shift_labels" if source == "labels" else "shift_input_ids"
    batch.evidence.append(TargetEvidence(name=shifted))
    if given.get("shift_labels") is not None:
        return {}
    return {"shift_labels": batch.shards[shifted].to(labels.device)}


def _same(tensor: Tensor, shard: Tensor | None) -> bool:
    if shard is None or tensor.shape != shard.shape:
        return False
    return tensor.data_ptr() == shard.data_ptr() or torch.equal(tensor, shard.to(tensor.device))


def install(state: SequenceState, root: nn.Module, *, sync_steps: bool = False) -> Handle:
    """Installs the interceptors for every transformers model below ``root``.

    Args:
        state: The strategy's state.
        root: The user's LightningModule.
        sync_steps: Whether ranks must call forward equally often (ZeRO-3), for ``generate``.

    Returns:
        A handle whose ``remove()`` restores everything.

    Raises:
        UlyssesError: For a model that cannot be made exact; only where P > 1.
    """
    from transformers import PreTrainedModel

    handle = Handle()
    try:
        _install_masks(state, handle)
        _install_attention(state, handle)
        _install_generate(state, handle, sync_steps)
        for model in root.modules():
            if isinstance(model, PreTrainedModel):
                if state.mesh.sp_size > 1:
                    check_model(model)
                hook = model.register_forward_pre_hook(_inject(state, model), with_kwargs=True)
                handle.add(hook.remove)
    except BaseException:
        handle.remove()
        raise
    return handle
