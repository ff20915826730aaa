"""Supplies transformers models with positions and shifted labels, which they cannot derive from a slice."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.interceptors.transformers.masks import PackedCall
from lightning_ulysses.interceptors.transformers.positions import Numbering
from lightning_ulysses.loss.targets import KnownTargets
from lightning_ulysses.notes import known
from lightning_ulysses.patching.outside_graphs import eager

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def supply_inputs(context: SequenceContext, model: PreTrainedModel, numbering: Numbering) -> Callable[..., Any]:
    """A forward pre-hook that adds the positions and shifted labels that a call of ``model`` leaves out."""
    signature = inspect.signature(model.forward)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    takes_cache = "use_cache" in signature.parameters
    is_pair = bool(getattr(model.config, "is_encoder_decoder", False))
    name = type(model).__name__
    # A state space tells tokens apart by their order, and has no heads of attention.
    attends = getattr(model.config, "num_attention_heads", None) is not None
    # transformers uses the loss of causal language models for a class without a loss type.
    shifts = (getattr(model, "loss_type", None) or "ForCausalLM").startswith("ForCausalLM")

    @eager
    def supply(batch: LocalBatch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**signature.bind_partial(*args, **kwargs).arguments, **kwargs}
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if not isinstance(tokens, Tensor):
            return None
        added: dict[str, Any] = {}
        if given.get("position_ids") is None:
            if "position_ids" in signature.parameters:
                positions = _positions(batch, tokens, context.mesh.sp_rank)
                added["position_ids"] = numbering.supplied(positions) if numbering.is_used else positions
            elif context.mesh.sp_size > 1 and attends and not context.is_proven and context.place.trial is None:
                # Without positions a model is told apart from others by a trial only.
                raise UlyssesError(
                    f"{name}, whose forward takes no position_ids",
                    "a model that can be told the positions of its tokens",
                    "train it without sequence parallelism (sp_size=1)",
                )
        note_packing(batch, given)
        # A key/value cache would hold the keys of one slice only, and cost memory.
        if takes_cache and given.get("use_cache") is None:
            added["use_cache"] = False
        labels = given.get("labels")
        if isinstance(labels, Tensor):
            added |= shifted_labels(batch, labels, given, shifts, takes_any, name)
        return (args, {**kwargs, **added}) if added else None

    def note_packing(batch: LocalBatch, given: dict[str, Any]) -> None:
        layout, note = batch.layout, batch.notes.of(PackedCall)
        if layout.uncached == layout.documents or (note.is_supplied and given.get("use_cache") is not None):
            # In the latter case a model around this one has taken note already.
            return
        note.is_supplied = given.get("use_cache") is None
        cached = takes_cache and _is_cached(model, given)
        note.is_found = not cached and _is_own(given.get("position_ids"), batch.shards.get("position_ids"))

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_pair and "shift_labels" in kwargs and context.place.batch is not None:
            # A decoder's labels are not shifted. It would hand what it does not know to its loss.
            shorter = {key: value for key, value in kwargs.items() if key != "shift_labels"}
            found = choose(args, shorter)
            return (args, shorter) if found is None else found
        return choose(args, kwargs)

    def choose(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch = context.described
        if batch is not None:
            return supply(batch, args, kwargs)
        # Outside of a region of a plan the model is whole, but a cache would reach into the blocks that are split.
        if context.plan is not None and context.place.batch is not None and takes_cache:
            note_packing(context.place.batch, {**signature.bind_partial(*args, **kwargs).arguments, **kwargs})
            return None if kwargs.get("use_cache") is not None else (args, {**kwargs, "use_cache": False})
        return None

    return hook


def _positions(batch: LocalBatch, tokens: Tensor, rank: int) -> Tensor:
    """The positions of this rank's tokens, (B, S_r): of the shape that models document, since some check it."""
    if batch.layout.documents is not None and batch.document_positions is not None:
        return batch.document_positions
    begin = batch.layout.starts[rank]
    # (S_r,) -> (B, S_r)
    return torch.arange(begin, begin + tokens.shape[1], device=tokens.device).expand(tokens.shape[0], -1)


def _is_cached(model: PreTrainedModel, given: dict[str, Any]) -> bool:
    """Whether a call fills a cache in one process; see transformers ``generic.merge_with_config_defaults``."""
    configs = model.config, model.config.get_text_config()
    wanted = (given.get("use_cache"), *(getattr(config, "use_cache", None) for config in configs))
    is_wanted = next((bool(each) for each in wanted if each is not None), False)
    return is_wanted and not (model.training and torch.is_grad_enabled() and model.is_gradient_checkpointing)


def _is_own(positions: Any, shard: Tensor | None) -> bool:
    """Whether positions of a call are those of the batch."""
    if shard is None or not isinstance(positions, Tensor):
        return False
    return positions in known([shard]) or _same(positions, shard)


def shifted_labels(
    batch: LocalBatch, labels: Tensor, given: dict[str, Any], shifts: bool, takes_any: bool, name: str
) -> dict[str, Tensor]:
    """The keyword argument ``shift_labels``, with which the last token of a slice has its label.

    Raises:
        UlyssesError: If the labels are not those of the batch, or the model does not accept shifted labels.
    """
    source = next((key for key in ("labels", "input_ids") if _same(labels, batch.shards.get(key))), None)
    if source is None and labels.dim() < 2:
        raise UlyssesError(
            f"labels of shape {tuple(labels.shape)} for {name}, which then pools the tokens of each row",
            "one label for each token, (B, S), since a pooling sees this rank's slice only",
            "train it without sequence parallelism (sp_size=1)",
        )
    if source is None:
        raise UlyssesError(
            f"labels of shape {tuple(labels.shape)} for {name} that are neither batch['labels'] nor batch['input_ids']",
            "labels that are part of the batch, since the label behind a slice's last token lies on the next rank",
            "make the labels in the collate function and pass batch['labels'] to the model",
        )
    known = batch.notes.of(KnownTargets)
    # A masked language model, for example: its labels are not shifted.
    if not shifts:
        known.name = source
        return {}
    if not takes_any:
        raise UlyssesError(
            f"{name}, which shifts labels inside its forward and takes no shift_labels",
            "a causal language model whose forward passes **kwargs to its loss function",
            "compute the loss in training_step from the logits and batch['shift_labels']",
        )
    shifted = "shift_labels" if source == "labels" else "shift_input_ids"
    known.name = shifted
    if given.get("shift_labels") is not None:
        return {}
    return {"shift_labels": batch.shards[shifted].to(labels.device)}


def _same(tensor: Tensor, shard: Tensor | None) -> bool:
    if shard is None or tensor.shape != shard.shape:
        return False
    return tensor is shard or tensor.is_set_to(shard) or torch.equal(tensor, shard.to(tensor.device))
