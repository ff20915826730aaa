"""Makes transformers models and batches small enough to compare."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_ulysses.batch.excerpt import both_ends, excerpt, most_filled
from lightning_ulysses.batch.whole import read_batch
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.batch_keys import BatchRules
from lightning_ulysses.patching.handle import Handle

_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def shrink_config(config: Any, layers: int) -> bool:
    """Reduces a config of transformers to at most ``layers`` layers. Returns whether it had more."""
    names = [name for name in _LAYER_KEYS if isinstance(vars(config).get(name), int) and vars(config)[name] > layers]
    for name in names:
        setattr(config, name, layers)
    kinds = getattr(config, "layer_types", None)
    if kinds and len(kinds) > layers:
        config.layer_types = list(kinds[:layers])
    return bool(names)


@contextmanager
def fewer_layers(layers: int | None) -> Iterator[None]:
    """Builds every transformers model inside with at most ``layers`` layers. The whole model never exists."""
    if layers is None:
        yield
        return
    from transformers import PreTrainedModel

    original = PreTrainedModel.__init__

    # Every model calls this before it makes its layers.
    @functools.wraps(original)
    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        shrink_config(config, layers)
        original(self, config, *args, **kwargs)

    handle = Handle()
    handle.patch(PreTrainedModel, "__init__", init)
    try:
        yield
    finally:
        handle.remove()


def shrink_module(module: nn.Module, layers: int) -> list[str]:
    """Replaces each transformers model below ``module`` by a new one of at most ``layers`` layers.

    Returns:
        Notes on the models replaced.

    Raises:
        UlyssesError: If there is no transformers model.
    """
    if "transformers.modeling_utils" not in sys.modules:
        raise _nothing_to_shrink(module)
    from transformers import PreTrainedModel

    notes: list[str] = []
    found = False
    for name, child in list(module.named_modules()):
        if not isinstance(child, PreTrainedModel) or any(name.startswith(f"{note}.") for note in notes):
            continue
        found = True
        config = copy.deepcopy(child.config)
        if shrink_config(config, layers):
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, type(child)(config).train(child.training))
            notes.append(name)
    if not found:
        raise _nothing_to_shrink(module)
    return [f"{name} built anew with {layers} layers and random weights" for name in notes]


def without_checkpointing(module: nn.Module) -> tuple[nn.Module, list[str]]:
    """A copy without activation checkpointing in its transformers models, if any of them uses it.

    The hook that transformers sets for it cannot be sent to other processes.

    Returns:
        The copy, or ``module`` itself if none uses it. And a note, if a copy was made.
    """
    if "transformers.modeling_utils" not in sys.modules:
        return module, []
    from transformers import PreTrainedModel

    # transformers renamed the flag, and the method that clears it.
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    flag = next(name for name in names if hasattr(PreTrainedModel, name))

    def models(root: nn.Module) -> list[Any]:
        return [each for each in root.modules() if isinstance(each, PreTrainedModel) and getattr(each, flag)]

    if not models(module):
        return module, []
    module = copy.deepcopy(module)
    for model in models(module):
        getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
        model.disable_input_require_grads()
    return module, ["gradient checkpointing, which changes no result, switched off for the comparison"]


def _nothing_to_shrink(module: nn.Module) -> UlyssesError:
    return UlyssesError(
        f"layers for {type(module).__name__}, which holds no transformers model",
        "a model of transformers, whose config says how many layers it has",
        "leave layers out, and build the module itself with fewer",
    )


def cut_batch(batch: Any, rules: BatchRules, most: int, sp_size: int) -> tuple[Any, int, int]:
    """At most ``most`` tokens of a batch: of both ends where it has positions, which stay as they are.

    Args:
        batch: A whole batch.
        rules: How to read it.
        most: Tokens.
        sp_size: P. If every row has targets in every slice of some excerpt, that one is taken.

    Returns:
        The batch, S before the cut, and S after it.
    """
    whole = read_batch(batch, rules, 1)
    seq_len = whole.layout.seq_len
    if seq_len <= most:
        return batch, seq_len, seq_len
    ends = [both_ends(seq_len, most)] if "position_ids" in whole.dims else []
    # Not the first tokens alone: those of a prompt are no targets.
    starts = ((seq_len - most) * place // 4 for place in range(5))
    candidates = (excerpt(batch, rules, *pieces) for pieces in (*ends, *(((start, most),) for start in starts)))
    return most_filled(candidates, rules, sp_size), seq_len, most
