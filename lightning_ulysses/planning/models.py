"""The model of a plan: a few of its blocks without memory, and how many there are."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lightning_ulysses.config import MemoryConfig
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.planning.lab import Step, blocks_of, call_with_labels

#: Blocks that run in a rehearsal. From the third on, each leaves as much as the one before: the model itself may hold
#: the input of the first, and what is offloaded leaves while the next block runs.
BLOCKS = 4


@dataclass(frozen=True)
class Facts:
    """Sizes of a whole model.

    Attributes:
        name: For messages.
        blocks: Repeated blocks.
        numel: Parameters.
        largest: Parameters of its largest submodule without submodules.
        hidden: Of hidden states.
        heads: H; 0 if unknown.
        kv_heads: H_kv.
        head_dim: D.
        vocab: V.
        per_token: Operations of a forward per token, see `cost.model`.
        per_pair: Operations of a forward per pair of tokens.
    """

    name: str
    blocks: int
    numel: int
    largest: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    per_token: float
    per_pair: float


@dataclass(frozen=True)
class Made:
    """A model of which a few blocks can be made.

    Attributes:
        facts: Of the whole model.
        make: Makes the model with a few blocks.
        step: Computes a loss.
    """

    facts: Facts
    make: Callable[[], nn.Module]
    step: Step


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        key: Tells models apart.
        load: Loads it.
    """

    key: str
    load: Callable[[], Made]


def find_model(given: str) -> Source:
    """A model by the path of its config, of a folder with one, or ``module.path:Class``.

    Raises:
        UlyssesError: If there is none.
    """
    path = Path(given)
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        return Source(f"{path.parent.name} {path.read_text()}", lambda: from_config(path))
    if ":" in given:
        return Source(given, lambda: from_class(given))
    raise UlyssesError(
        f"--model {given}, which is no file, no folder with config.json, and no module.path:Class",
        "the config.json of a transformers model, its folder, or a class that can be imported from here",
        "check the path, or write module.path:Class",
    )


def from_config(path: Path) -> Made:
    """A causal language model of transformers.

    Raises:
        UlyssesError: If the file is no config of one.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        values = json.loads(path.read_text())
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    except (ValueError, KeyError, OSError) as error:
        raise UlyssesError(
            f"{path}: {type(error).__name__} {error}", "the config.json of a transformers model", "check the file"
        ) from None
    sizes = config.get_text_config()
    total = int(sizes.num_hidden_layers)
    for each in {id(config): config, id(sizes): sizes}.values():
        if hasattr(each, "num_hidden_layers"):
            each.num_hidden_layers = min(total, BLOCKS)
        if getattr(each, "layer_types", None):
            each.layer_types = list(each.layer_types)[:BLOCKS]
        each.use_cache = False
    config._attn_implementation = "sdpa"
    name = (values.get("architectures") or [values.get("_name_or_path") or path.parent.name])[0]
    return _made(str(name), lambda: AutoModelForCausalLM.from_config(config), total)


def from_class(given: str) -> Made:
    """A module of the user's, made without arguments.

    A LightningModule gets a batch with ``input_ids`` and ``labels`` in its ``training_step``; another module is called
    as one of transformers.

    Raises:
        UlyssesError: If it cannot be imported or made.
    """
    module, _, name = given.partition(":")
    # Behind everything else: a file of the user's must not take the place of a library.
    sys.path.append(str(Path.cwd()))
    try:
        kind = getattr(importlib.import_module(module), name)
        with FakeTensorMode(allow_non_fake_inputs=True):
            total = len(blocks_of(kind(), MemoryConfig()))
    except Exception as error:
        raise UlyssesError(
            f"--model {given}, of which no module can be made: {type(error).__name__} {error}",
            "a class of modules that can be imported from here and made without arguments",
            "write a function or a class without arguments that makes the module, and name it",
        ) from error
    finally:
        sys.path.pop()

    def make() -> nn.Module:
        made: nn.Module = kind()
        _shorten(made)
        return made

    return _made(name, make, total)


def _training_step(module: Any, batch: Mapping[str, Tensor]) -> Tensor:
    loss = module.training_step(dict(batch), 0)
    return loss["loss"] if isinstance(loss, Mapping) else loss


def _shorten(module: nn.Module) -> None:
    """Leaves the first blocks of each list of them."""
    blocks = {id(block) for block in blocks_of(module, MemoryConfig())}
    for inner in list(module.modules()):
        if isinstance(inner, nn.ModuleList) and any(id(each) in blocks for each in inner):
            del inner[BLOCKS:]


def _made(name: str, make: Callable[[], nn.Module], total: int) -> Made:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = make()
    blocks = blocks_of(model, MemoryConfig())
    numel = _numel(model) + (_numel(blocks[0]) if blocks else 0) * (total - len(blocks))
    configs = [each for inner in model.modules() if (each := getattr(inner, "config", None)) is not None]
    config: Any = configs[0].get_text_config() if configs and hasattr(configs[0], "get_text_config") else None
    heads = int(getattr(config, "num_attention_heads", None) or 0)
    hidden = int(getattr(config, "hidden_size", None) or 0)
    head_dim = int(getattr(config, "head_dim", None) or (hidden // heads if heads else 0))
    facts = Facts(
        name=name,
        blocks=total,
        numel=numel,
        largest=max((_numel(inner) for inner in model.modules() if not [*inner.children()]), default=0),
        hidden=hidden,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=head_dim,
        vocab=int(getattr(config, "vocab_size", None) or 0),
        # An embedding is looked up; a head of its own is not counted twice.
        per_token=2.0 * (numel - _idle(blocks[-1], config) * total if blocks else numel),
        # Causal: half of the pairs.
        per_pair=2.0 * total * heads * head_dim,
    )
    return Made(facts, make, _training_step if hasattr(model, "training_step") else call_with_labels)


def _idle(block: nn.Module, config: Any) -> int:
    """Parameters of a block's experts that one token does not pass. Transformers stacks experts in one tensor."""
    counts = [getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")]
    experts, chosen = (
        next((int(each) for each in counts if each), 0),
        int(getattr(config, "num_experts_per_tok", 0) or 0),
    )
    stacked = sum(each.numel() for each in block.parameters() if each.dim() == 3 and each.shape[0] == experts)
    return stacked * (experts - chosen) // experts if experts and chosen else 0


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
