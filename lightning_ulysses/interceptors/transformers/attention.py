"""Intercepts Hugging Face transformers.

Models branch on the *name* of the attention implementation, so the functions registered under its names are replaced
while a strategy is set up, and put back afterwards.

Sources: transformers ``integrations/sdpa_attention.py``, ``integrations/flash_attention.py``.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_ulysses.attention.explicit import Extras
from lightning_ulysses.attention.stand_in import probe_attention
from lightning_ulysses.attention.ulysses import local_mask_error, sharded_attention
from lightning_ulysses.context import LiveBatch, SequenceState
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.mask_spec import MaskSpec
from lightning_ulysses.interceptors.transformers.eager import check_formula, install_eager
from lightning_ulysses.interceptors.transformers.generation import install_generate
from lightning_ulysses.interceptors.transformers.masks import find_mask, install_masks
from lightning_ulysses.interceptors.transformers.model_inputs import supply_inputs
from lightning_ulysses.interceptors.transformers.positions import Numbering
from lightning_ulysses.interceptors.transformers.router_loss import check_router, install_router
from lightning_ulysses.patching.handle import Handle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATIONS = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
# Their windows are part of the mask; the others are told.
_MASKED = ("sdpa", "flex_attention", "eager")
_UNSUPPORTED_FEATURES = ("position_bias", "cache")


def _names(root: nn.Module) -> list[str]:
    """Attention functions to replace: transformers' own, and kernels of the hub that it calls as flash-attn."""
    from transformers import PreTrainedModel
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.modeling_utils import AttentionInterface

    registry: dict[str, Any] = AttentionInterface._global_mapping
    used = {getattr(m.config, "_attn_implementation", None) for m in root.modules() if isinstance(m, PreTrainedModel)}
    hub = [name for name in used if name is not None and registry.get(name) is flash_attention_forward]
    return [*IMPLEMENTATIONS, *sorted(set(hub) - set(IMPLEMENTATIONS))]


def _call_spec(batch: LiveBatch, attention_mask: Tensor | None, is_causal: bool, window: int | None) -> MaskSpec:
    layout = batch.layout
    if attention_mask is None:
        return MaskSpec(is_causal, window, layout.documents, num_padding=layout.num_padding)
    spec = find_mask(batch, attention_mask)
    if spec is not None:
        return spec
    shard = batch.shards.get("attention_mask")
    if shard is not None and attention_mask.dim() == 2 and attention_mask.shape == shard.shape:
        return MaskSpec(is_causal, window, layout.documents, layout.valid, layout.num_padding)
    raise local_mask_error(attention_mask, layout)


def _stranger(module: nn.Module) -> UlyssesError:
    return UlyssesError(
        f"{type(module).__name__} of a model that was no part of the LightningModule when the Trainer set it up",
        "a model whose positions and labels can be supplied, since they count from 0 on every rank",
        "make the model an attribute of the LightningModule, in __init__ or configure_model",
    )


def _check_features(module: nn.Module, arguments: Mapping[str, Any]) -> None:
    present = [feature for feature in _UNSUPPORTED_FEATURES if arguments.get(feature) is not None]
    if present:
        raise UlyssesError(
            f"{type(module).__name__} with {', '.join(present)}",
            "attention that is plain softmax over queries, keys and values",
            "train this model without sequence parallelism (sp_size=1)",
        )


def _wrap(
    state: SequenceState,
    known: weakref.WeakSet[nn.Module],
    tried: set[tuple[type, Any]],
    name: str,
    original: Callable[..., Any],
) -> Callable[..., Any]:
    """The replacement of one function; ``tried`` collects the eager ones whose formula has been checked."""

    @state.takes_over(original)
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
        if state.probing:
            # (B, H, S, D_v) -> (B, S, H, D_v)
            return probe_attention(state, query, key, value).transpose(1, 2).contiguous(), None
        batch = state.described_batch
        whole = state.mesh.sp_size == 1
        if batch is None or (whole and (attention_mask is None or find_mask(batch, attention_mask) is None)):
            settings = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
            out: tuple[Tensor, None] = original(module, query, key, value, attention_mask, **settings)
            return out
        if not whole and module not in known:
            raise _stranger(module)
        _check_features(module, kwargs)
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        window = kwargs.get("sliding_window") if name not in _MASKED and causal else None
        spec = _call_spec(batch, attention_mask, causal, window)
        extras = Extras(kwargs.get("softcap"), kwargs.get("s_aux"))
        if name == "eager" and (type(module), original) not in tried:
            check_formula(original, module, query, key, value, scaling, extras, **kwargs)
            tried.add((type(module), original))
        result = sharded_attention(state, query, key, value, spec, scale=scaling, dropout_p=dropout, extras=extras)
        # (B, H, S_r, D_v) -> (B, S_r, H, D_v)
        return result.transpose(1, 2).contiguous(), None

    return attention_forward


def _install_attention(state: SequenceState, handle: Handle, root: nn.Module, names: list[str]) -> None:
    from transformers.modeling_utils import AttentionInterface

    wrap = functools.partial(_wrap, state, weakref.WeakSet(root.modules()), set())
    registry: dict[str, Any] = AttentionInterface._global_mapping
    for name in names:
        handle.patch_item(registry, name, wrap(name, registry[name]))
    install_eager(handle, wrap)


def check_model(model: PreTrainedModel, mesh: SequenceMesh, names: list[str]) -> None:
    """Refuses, before the first step, what cannot be made exact.

    Raises:
        UlyssesError: Naming the model, the reason and the change.
    """
    name, config = type(model).__name__, model.config
    if isinstance(num_heads := getattr(config, "num_attention_heads", None), int):
        mesh.check_heads(num_heads)
    implementation = getattr(config, "_attn_implementation", None)
    # Some models have no other implementation; what theirs computes is tried in the first step.
    only_eager = implementation == "eager" and not getattr(model, "_supports_sdpa", True)
    if implementation not in names and not only_eager:
        raise UlyssesError(
            f"{name} with attn_implementation={implementation!r}",
            f"one of {names}, since the others attend within this rank's slice only",
            "load the model with attn_implementation='sdpa'",
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UlyssesError(
            f"{name}, an encoder-decoder model",
            "a model with one sequence",
            "train it without sequence parallelism (sp_size=1)",
        )
    check_router(model)


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
        names = _names(root)
        install_masks(state, handle, (*names, "eager"))
        _install_attention(state, handle, root, names)
        install_generate(state, handle, sync_steps)
        models = [model for model in root.modules() if isinstance(model, PreTrainedModel)]
        numbering = Numbering(state)
        for model in models:
            if state.mesh.sp_size > 1:
                check_model(model, state.mesh, names)
            hook = model.register_forward_pre_hook(supply_inputs(state, model, numbering), with_kwargs=True)
            handle.add(hook.remove)
        numbering.install(root, handle)
        install_router(state, handle, models)
    except BaseException:
        handle.remove()
        raise
    return handle
