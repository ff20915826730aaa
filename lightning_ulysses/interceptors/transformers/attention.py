"""Intercepts the attention functions of Hugging Face transformers.

Models branch on the *name* of their attention implementation. So the names stay the same, and the functions registered
under them are replaced while a strategy is set up.

Sources: transformers ``integrations/sdpa_attention.py``, ``integrations/flash_attention.py``.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_ulysses.attention.attend import Softmax
from lightning_ulysses.attention.call import AttentionCall
from lightning_ulysses.attention.call_mask import covers_sequence, local_mask_error, read_mask
from lightning_ulysses.attention.explicit import Extras
from lightning_ulysses.attention.flash import FlashKernel, flash_kernel
from lightning_ulysses.attention.route import intercept
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.mask_spec import MaskSpec
from lightning_ulysses.interceptors.transformers.eager import check_formula
from lightning_ulysses.interceptors.transformers.generation import install_generate
from lightning_ulysses.interceptors.transformers.masks import LeftOut, install_masks
from lightning_ulysses.interceptors.transformers.model_inputs import supply_inputs
from lightning_ulysses.interceptors.transformers.position_bias import install as install_position_bias
from lightning_ulysses.interceptors.transformers.position_bias import with_position_bias
from lightning_ulysses.interceptors.transformers.positions import Numbering
from lightning_ulysses.interceptors.transformers.router_loss import check_router, install_router
from lightning_ulysses.interceptors.transformers.temperature import install as install_temperature
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.upstream.transformers_flash import variable_length_function

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATIONS = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
# These get a sliding window as part of their mask. The others get it as an argument.
_MASKED = ("sdpa", "flex_attention", "eager")
_UNSUPPORTED_FEATURES = ("cache",)


def _used(root: nn.Module) -> set[Any]:
    """The attention implementations of the models below ``root``."""
    from transformers import PreTrainedModel

    return {getattr(m.config, "_attn_implementation", None) for m in root.modules() if isinstance(m, PreTrainedModel)}


def _flash_kernels(root: nn.Module, names: list[str]) -> dict[str, FlashKernel | None]:
    """The kernels of flash-attn that models run on, by the names of their implementations."""
    wanted = [name for name in names if name in _used(root) and name not in ("sdpa", "flex_attention")]
    labels = {name: name.replace("flash_attention_", "flash-attn ") for name in wanted}
    return {name: flash_kernel(variable_length_function(name), label) for name, label in labels.items()}


def _names(root: nn.Module) -> list[str]:
    """Names of the functions to replace: transformers' own, and kernels of the hub that run as flash-attn."""
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.modeling_utils import AttentionInterface

    registry: dict[str, Any] = AttentionInterface._global_mapping
    hub = [name for name in _used(root) if name is not None and registry.get(name) is flash_attention_forward]
    return [*IMPLEMENTATIONS, *sorted(set(hub) - set(IMPLEMENTATIONS))]


def _call_spec(
    batch: LocalBatch,
    known: MaskSpec | None,
    attention_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    has_padding: bool,
) -> tuple[MaskSpec, Tensor | None]:
    """The spec and the bias of a call; ``has_padding`` if the step's batch has a padding mask."""
    layout = batch.key_layout
    if known is not None:
        return known, None
    if attention_mask is None:
        return MaskSpec(is_causal, window, layout.documents, num_padding=layout.num_padding), None
    # flash-attn takes the 2-D padding mask itself; then it is the slice of the batch's mask, or all of it.
    if attention_mask.dim() == 2 and has_padding and attention_mask.shape[1] in (*layout.shares, layout.seq_len):
        return MaskSpec(is_causal, window, layout.documents, layout.valid, layout.num_padding), None
    if attention_mask.dim() == 4 and attention_mask.shape[-2] == 1 != layout.real_len:
        return read_mask(batch, None, attention_mask, MaskSpec(False, num_padding=layout.num_padding))
    # A mask of the whole sequence tells by itself what each token sees.
    if not covers_sequence(attention_mask, batch):
        raise local_mask_error(attention_mask, batch)
    return MaskSpec(False, window, num_padding=layout.num_padding), attention_mask


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


def _write(out: Tensor) -> tuple[Tensor, None]:
    # (B, H, S_r, D_v) -> (B, S_r, H, D_v)
    return out.transpose(1, 2).contiguous(), None


def _wrap(
    context: SequenceContext,
    ours: weakref.WeakSet[nn.Module],
    tried: set[tuple[type, Any]],
    flash: Mapping[str, FlashKernel | None],
    name: str,
    original: Callable[..., Any],
) -> Callable[..., Any]:
    """The replacement of one attention function.

    Args:
        context: Tells what is split at this moment.
        ours: The submodules of the LightningModule.
        tried: Collects eager functions whose formula has been checked, with the class that calls them.
        flash: For names of implementations the kernel of flash-attn that models run on.
        name: Name of the implementation.
        original: The function.
    """

    def read(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> AttentionCall:
        def meaning(batch: LocalBatch, known: MaskSpec | None) -> Softmax:
            if context.mesh.sp_size > 1 and module not in ours:
                raise _stranger(module)
            _check_features(module, kwargs)
            # The same default as in transformers' `sdpa_attention_forward`.
            causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
            window = kwargs.get("sliding_window") if name not in _MASKED and causal else None
            softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
            extras = None if softcap is None and sinks is None else Extras(softcap, sinks)
            running = context.place.batch
            has_padding = running is not None and "attention_mask" in running.shards
            is_left_out = attention_mask is not None and attention_mask in context.notes.of(LeftOut)
            if known is not None and is_left_out and known.causal != causal:
                known = replace(known, causal=causal, window=None, ahead=None)
            spec, bias = _call_spec(batch, known, attention_mask, causal, window, has_padding)
            bias = with_position_bias(batch, kwargs.get("position_bias"), bias, is_split=context.split is not None)
            # Only the first call of each class: the check runs the model's own function.
            if name == "eager" and (type(module), original) not in tried:
                check_formula(original, module, query, key, value, scaling, extras, **kwargs)
                tried.add((type(module), original))
            return Softmax(spec, bias, scaling, dropout, extras, flash.get(name))

        return AttentionCall(query, key, value, meaning, attention_mask, takes_memory=False, write=_write)

    return intercept(context, original, read)


def _install_attention(context: SequenceContext, handle: Handle, root: nn.Module, names: list[str]) -> None:
    from transformers.modeling_utils import AttentionInterface

    # Before anything is patched, since loading a kernel of the hub registers its function anew.
    flash = _flash_kernels(root, names)
    wrap = functools.partial(_wrap, context, weakref.WeakSet(root.modules()), set(), flash)
    registry: dict[str, Any] = AttentionInterface._global_mapping
    for name in names:
        handle.patch_item(registry, name, wrap(name, registry[name]))
    _install_eager(handle, wrap)


def _install_eager(handle: Handle, wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replaces the functions that models use under ``attn_implementation="eager"``.

    Args:
        handle: Takes the undo.
        wrap: Makes the replacement of a function, given ``"eager"`` and the function.
    """
    # These functions are not registered: each model passes its own as the default of `get_interface`.
    from transformers.modeling_utils import AttentionInterface

    original = AttentionInterface.get_interface
    # One replacement for each function, and not a new one for each call.
    wrapped = functools.lru_cache(maxsize=None)(functools.partial(wrap, "eager"))

    @functools.wraps(original)
    def get_interface(self: AttentionInterface, attn_implementation: str, default: Callable[..., Any]) -> Any:
        found = original(self, attn_implementation, default)
        return wrapped(default) if attn_implementation == "eager" and found is default else found

    handle.patch(AttentionInterface, "get_interface", get_interface)


def check_model(model: PreTrainedModel, names: list[str]) -> None:
    """Refuses models that cannot be made exact, before the first step.

    Raises:
        UlyssesError: With the model, the reason and the change.
    """
    name, config = type(model).__name__, model.config
    implementation = getattr(config, "_attn_implementation", None)
    # Some models have only eager attention. Its formula is checked in the first step, see `check_formula`.
    only_eager = implementation == "eager" and not getattr(model, "_supports_sdpa", True)
    if implementation not in names and not only_eager:
        raise UlyssesError(
            f"{name} with attn_implementation={implementation!r}",
            f"one of {names}, since the others attend within this rank's slice only",
            "load the model with attn_implementation='sdpa'",
        )
    check_router(model)


def install(context: SequenceContext, root: nn.Module, *, sync_steps: bool = False) -> Handle:
    """Installs the interceptors for all transformers models below ``root``.

    Args:
        context: Tells what is split at this moment.
        root: The user's LightningModule.
        sync_steps: Whether all ranks must call forward equally often in ``generate`` (ZeRO-3).

    Returns:
        A handle whose ``remove()`` restores everything.

    Raises:
        UlyssesError: For a model that cannot be made exact, if P > 1.
    """
    from transformers import PreTrainedModel

    handle = Handle()
    try:
        names = _names(root)
        install_masks(context, handle, (*names, "eager"))
        _install_attention(context, handle, root, names)
        install_generate(context, handle, sync_steps)
        models = [model for model in root.modules() if isinstance(model, PreTrainedModel)]
        numbering = Numbering(context)
        for model in models:
            if context.mesh.sp_size > 1:
                check_model(model, names)
            hook = model.register_forward_pre_hook(supply_inputs(context, model, numbering), with_kwargs=True)
            handle.add(hook.remove)
        # After the hooks above, since these hooks may replace the positions that those supply.
        numbering.install(root, handle)
        install_router(context, handle, models)
        install_temperature(context, root, handle)
        install_position_bias(context, root, handle)
    except BaseException:
        handle.remove()
        raise
    return handle
