"""Makes a tiny model of any architecture of the installed transformers: sizes by names of settings, and by trying."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from hybrids import decay_slowly
from torch import Tensor
from zoo import ZOO

VOCAB, WIDTH, HEADS, LAYERS, LENGTH = 99, 32, 4, 2, 33
# The first pattern that a name fits decides how large its number may be.
SIZES: tuple[tuple[str, int], ...] = (
    # Numbers of layers that are picked.
    (r"feature_layer|layer_ind|_indexes$|_indices$", LAYERS - 1),
    (
        r"type_vocab|num_buckets|num_labels|channels|dilation|stride|(^|_)pretraining|num_nextn|num_mem_blocks|conv_kernel|_bits",
        0,
    ),
    (r"vocab", VOCAB),
    (r"key_value_heads|kv_heads|n_head_kv|num_query_groups|multi_query_group", 2),
    (r"rope_head_dim|rotary_dim|state|d_conv", 4),
    (r"head_dim|d_kv|head_size|dim_head|kv_channels|d_head", WIDTH // HEADS),
    (r"heads?$|n_heads?|heads_per", HEADS),
    (r"layers?$|_layers_|blocks?$|depth|n_layer|hidden_groups|first_k_dense", LAYERS),
    (r"per_tok|top_?k|moe_k|num_selected", 2),
    (r"shared_expert.*size|expert.*(size|dim|ffn)", 16),
    (r"shared_experts|n_group|expert_group", 1),
    (r"experts?$|num_.*experts", 4),
    (r"intermediate|ffn|d_ff|inner|feed_forward|mlp|expansion_dim", 48),
    (r"lora|rank", 16),
    (r"positions?$|position_embeddings|max_seq|seq_len|n_ctx|context_length|max_.*length|_length$", 256),
    (r"window|attention_chunk", 8),
    (r"image_size|resolution", 16),
    (r"patch_size", 4),
    (r"chunk|block_size|bucket", 16),
    (r"size$|dim$|d_model|n_embd|embed|width|d_inner|features|dim_", WIDTH),
)
# A try changes settings of those before it.
TRIES: tuple[dict[str, Any], ...] = (
    {},
    {"kv": HEADS},
    {"kv": HEADS, "head": 0},
    {"head": 16},
    {"width": 64},
    {"kv": HEADS, "width": 64, "head": 16},
    {"kv": 1},
    {"layers": 4},
    {"layers": 8},
    {"fill": WIDTH // HEADS, "kv": HEADS},
    {"positions": 0},
    # Of the angles of a head those of time, height and width: 4, or 2 where half of a head is rotated.
    {"mrope": (2, 1, 1)},
    {"mrope": (1, 1, 0)},
    {"none": True},
    {"none": True, "kv": HEADS},
    # Networks of stages, whose sizes belong together: one block in each stage.
    {"stages": 1, "image": 32},
    {"stages": 1, "image": 32, "all": True},
    {"stages": 1, "image": 64, "all": True},
    {"stages": 1, "all": True},
    {"stages": 3, "image": 64, "all": True},
    # Settings of one kind stay as they are.
    *(
        {"kept": kind, **more}
        for more in ({}, {"kv": HEADS}, {"none": True, "kv": HEADS})
        for kind in range(len(SIZES))
    ),
)
MOST_PARAMETERS = 25_000_000
# What may be missing though it has no default that works.
_NONES = r"head_dim|per_tok|top_?k|expert|group|window|heads|patch_size|intermediate|hidden_size"


class Unbuilt(Exception):
    """No try gave a model."""


def _limit(name: str, changed: Mapping[str, Any]) -> int:
    """The largest number for a setting; 0 leaves it."""
    if "stages" in changed:
        is_depth = re.search(r"depths?$|^num_(hidden_)?layers$", name)
        return int(changed.get("image", 0) if name == "image_size" else changed["stages"] if is_depth else 0)
    for kind, (pattern, size) in enumerate(SIZES):
        if re.search(pattern, name):
            if changed.get("kept") == kind:
                return 0
            if "key_value" in pattern:
                return int(changed.get("kv", size))
            if pattern.startswith("head_dim"):
                return int(changed.get("head", size))
            if pattern.startswith("positions"):
                return int(changed.get("positions", size))
            if size == LAYERS and "layers" in pattern:
                return int(changed.get("layers", size))
            if size == WIDTH:
                return int(changed.get("width", size))
            return size
    return 0


def _smaller(name: str, value: Any, changed: Mapping[str, Any]) -> Any:
    if name.endswith("_token_id") or name.endswith("_token_index"):
        special = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1}
        small = next((id_ for key, id_ in special.items() if name.startswith(key)), 90)
        return value if not isinstance(value, int) or value < VOCAB else small
    if isinstance(value, bool) or not isinstance(value, (int, list, tuple)):
        return value
    limit = _limit(name, changed)
    if isinstance(value, int):
        return min(value, limit) if limit and value > 0 else value
    if value and all(type(each) is int for each in value):
        return type(value)(min(each, limit) if limit and each > 0 else each for each in value)
    return value


def settings_of(kind: Any, changed: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """Arguments of a configuration class that make it small."""
    default = kind()
    layers = getattr(default, "num_hidden_layers", None)
    parts = {} if depth > 2 else dict(getattr(kind, "sub_configs", {}))
    found: dict[str, Any] = {}
    for name, value in vars(default).items():
        if name.startswith("_") or name in parts or name in ("layer_types", "mlp_layer_types", "torch_dtype", "dtype"):
            continue
        if isinstance(value, float) and "drop" in name:
            found[name] = 0.0
            continue
        if name == "use_cache":
            # A cache of layers without attention has no length.
            found[name] = False
            continue
        if name == "head_dim" and value is None and "fill" in changed:
            found[name] = changed["fill"]
            continue
        if value is None and "none" in changed and re.search(_NONES, name) and _limit(name, changed):
            found[name] = _limit(name, changed)
            continue
        if name == "rope_parameters" and isinstance(value, dict) and "mrope" in changed:
            found[name] = {**value, "mrope_section": [*changed["mrope"]]}
            continue
        if isinstance(value, (list, tuple)) and layers and len(value) == layers and "all" not in changed:
            # One for each layer.
            value = type(value)(value[: _limit("num_hidden_layers", changed)])
            found[name] = value
        small = _smaller(name, value, changed)
        if small is not value and small != value:
            found[name] = small
    for name in parts:
        part = getattr(default, name, None)
        if part is not None and hasattr(part, "to_dict"):
            own = type(part)
            given = settings_of(own, changed, depth + 1)
            found[name] = {"model_type": own.model_type, **given} if own.model_type else given
    return found


@dataclass(frozen=True)
class Kind:
    """What a class of models is given, and what its loss is a mean over.

    Args:
        mapping: The table of transformers that names the classes.
        batch: Makes a batch, given the configuration and a seed.
        count: Targets of a batch.
    """

    mapping: str
    batch: Callable[[Any, int], dict[str, Tensor]]
    count: Callable[[dict[str, Tensor]], float]


def text(config: Any, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 60, (2, LENGTH), generator=generator)
    labels = tokens.clone()
    labels[:, : 3 + seed] = -100
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    return {"input_ids": tokens, "labels": labels}


def texts(config: Any, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, 60, (2, 21), generator=generator)
    labels[0, -3:] = -100
    return {"input_ids": torch.randint(3, 60, (2, LENGTH), generator=generator), "labels": labels}


def images(config: Any, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(3, *_size(config), generator=generator)
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1, 1])}


def shifted_targets(batch: dict[str, Tensor]) -> float:
    return float((batch["labels"][:, 1:] != -100).sum())


def targets(batch: dict[str, Tensor]) -> float:
    return float((batch["labels"] != -100).sum())


# In this order: a model that has several classes is taken by the first.
KINDS: dict[str, Kind] = {
    "pair": Kind("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", texts, targets),
    "masked": Kind("MODEL_FOR_MASKED_LM_MAPPING_NAMES", text, targets),
    "causal": Kind("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", text, shifted_targets),
    "sight": Kind("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", text, shifted_targets),
    "image": Kind("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", images, lambda batch: float(len(batch["labels"]))),
}


def _size(config: Any) -> tuple[int, int, int]:
    """Channels, height and width of an image."""
    parts = [config, *(getattr(config, name, None) for name in ("vision_config", "encoder"))]
    size = next((found for part in parts if (found := getattr(part, "image_size", None))), 64)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    return next((found for part in parts if (found := getattr(part, "num_channels", None))), 3), height, width


def _sound(config: Any) -> tuple[int, int]:
    part = getattr(config, "audio_config", None) or getattr(config, "encoder_config", None) or config
    return int(getattr(part, "num_mel_bins", 0) or 80), 8 * LENGTH


# Inputs beside the text and its labels: their shape behind that of rows, and below which number they count; 0 for
# reals, and -1 for ones.
EXTRAS: dict[str, tuple[Callable[[Any], tuple[int, ...]], int]] = {
    "pixel_values": (_size, 0),
    "input_features": (_sound, 0),
    "qformer_input_ids": (lambda config: (5,), 20),
    "qformer_attention_mask": (lambda config: (5,), -1),
    "image_attention_mask": (lambda config: (LENGTH, 1), -1),
    "flattened_patches": (lambda config: (12, 2 + 3 * config.vision_config.patch_size**2), 0),
    "mm_token_type_ids": (lambda config: (LENGTH,), 1),
    "token_type_ids": (lambda config: (LENGTH,), 1),
    "bbox": (lambda config: (LENGTH, 4), 0),
    "lang_ids": (lambda config: (), 1),
    "state": (lambda config: (config.max_state_dim,), 0),
    "actions": (lambda config: (config.chunk_size, config.max_action_dim), 0),
}
GIVEN = ("input_ids", "labels", "spatial_shapes", "pixel_attention_mask", *EXTRAS)


def extra(name: str, config: Any, rows: int) -> Tensor:
    """An input of this name; see `EXTRAS`."""
    generator = torch.Generator().manual_seed(7)
    shape, kinds = EXTRAS[name]
    size = (rows, *shape(config))
    if kinds < 0:
        return torch.ones(size, dtype=torch.int64)
    return torch.randint(0, kinds, size, generator=generator) if kinds else torch.rand(size, generator=generator)


def batches(kind: str, config: Any, cls: str) -> Iterator[dict[str, Tensor]]:
    """Batches that a class may take: of text alone, and with what else its forward has a name for."""
    import transformers

    given = KINDS[kind].batch(config, 1)
    yield given
    takes = inspect.signature(getattr(transformers, cls).forward).parameters
    known = [name for name in EXTRAS if name in takes]
    needed = {name for name in known if takes[name].default is inspect.Parameter.empty}
    if kind == "image":
        yield from _other_images(given, config, takes)
        return
    # One at a time, and all of them.
    for names in (*({name} for name in known), {*known}):
        more = {name: extra(name, config, len(given["labels"])) for name in known if name in needed | names}
        for count in _placeholders(config) if "input_ids" in takes else ():
            yield {**_with_placeholders(given, config, count), **more}
            if "pixel_values" in more:
                # Several images in a row.
                several = {"pixel_values": more["pixel_values"].unsqueeze(1)}
                yield {**_with_placeholders(given, config, count), **more, **several}
        yield {"labels": given["labels"], **more}


def _other_images(given: dict[str, Tensor], config: Any, takes: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Images that are patches already, or tokens."""
    rows, labels = len(given["labels"]), given["labels"]
    if "spatial_shapes" in takes:
        vision = getattr(config, "vision_config", config)
        patches = torch.rand(rows, 16, vision.num_channels * vision.patch_size**2)
        shapes, mask = torch.tensor([[4, 4]] * rows), torch.ones(rows, 16, dtype=torch.int64)
        yield {"pixel_values": patches, "spatial_shapes": shapes, "pixel_attention_mask": mask, "labels": labels}
    if "input_ids" in takes:
        yield {"input_ids": torch.randint(3, 60, (rows, LENGTH)), "labels": labels}


def _placeholders(config: Any) -> Iterator[int]:
    """How many tokens of a row may stand for an image or a sound."""
    yield 0
    vision = getattr(config, "vision_config", config)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if getattr(config, "num_query_tokens", None):
        yield config.num_query_tokens
    if isinstance(size, int) and isinstance(patch, int):
        yield (size // patch) ** 2


def _with_placeholders(given: dict[str, Tensor], config: Any, count: int) -> dict[str, Tensor]:
    names = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index")
    token = next((found for name in names if (found := getattr(config, name, None)) is not None), None)
    if not count or token is None:
        return given
    tokens, labels = given["input_ids"].clone(), given["labels"].clone()
    tokens[:, 2 : 2 + count] = token
    labels[tokens == token] = -100
    return {**given, "input_ids": tokens, "labels": labels}


def architectures() -> dict[str, tuple[str, str]]:
    """For each model type that some kind has a class for, the kind and the class."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    found: dict[str, tuple[str, str]] = {}
    for kind, what in KINDS.items():
        known = getattr(modeling_auto, what.mapping)
        for name in CONFIG_MAPPING_NAMES:
            if name in known and name not in found:
                cls = known[name]
                found[name] = kind, cls if isinstance(cls, str) else cls[0]
    return found


class Tiny(L.LightningModule):
    """A user's module around a model of transformers."""

    def __init__(self, cls: str, config: Any) -> None:
        super().__init__()
        import transformers

        torch.manual_seed(0)
        self.model: Any = getattr(transformers, cls)(config)
        decay_slowly(self.model)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        # Data loaders draw as well, in a run and not by hand.
        torch.manual_seed(batch_idx)
        loss: Tensor = self.model(**{key: batch[key] for key in GIVEN if key in batch}).loss
        return loss.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _configs(name: str, cls: str) -> Iterator[Any]:
    import transformers

    kind = getattr(transformers, cls).config_class or transformers.CONFIG_MAPPING[name]
    if cls in ZOO:
        entry = ZOO[cls]
        yield partial(kind, vocab_size=VOCAB, pad_token_id=0, **entry.sizes)
    seen: list[Any] = []
    # Where each stage has a size of its own, one size for all of them is no model.
    has_stages = any(isinstance(getattr(kind(), each, None), (list, tuple)) for each in ("depths", "hidden_sizes"))
    for changed in sorted(TRIES, key=lambda each: "stages" not in each) if has_stages else TRIES:
        settings = settings_of(kind, changed)
        if settings not in seen:
            seen.append(settings)
            yield partial(kind, **settings)


def tiny(name: str, kind: str, cls: str) -> tuple[Any, dict[str, Tensor], str]:
    """A configuration of an architecture whose step in one process has a finite loss, a batch, and its kind.

    Raises:
        Unbuilt: With the first error of all tries.
    """
    why = ""
    # A model that hears has its sound in the text that it continues.
    for way in (kind, "causal") if kind == "pair" else (kind,):
        try:
            for make in _configs(name, cls):
                try:
                    return (*_running(make, way, cls), way)
                except Exception as error:
                    why = why or f"{type(error).__name__}: {error}"
        except Exception as error:
            # Its default configuration is none.
            why = why or f"{type(error).__name__}: {error}"
    raise Unbuilt(" ".join(why.split())[:200] if why else "no try")


def _running(make: Callable[[], Any], kind: str, cls: str) -> tuple[Any, dict[str, Tensor]]:
    import transformers

    config = make()
    for key in [key for key, value in vars(config).items() if isinstance(value, float) and "drop" in key]:
        setattr(config, key, 0.0)
    for key in ("pad_token_id", "decoder_start_token_id"):
        if getattr(config, key, None) is None and (kind == "pair" or getattr(config, "is_encoder_decoder", False)):
            setattr(config, key, 0)
    if getattr(config, "image_token_id", 0) is None:
        config.image_token_id = 90
    with torch.device("meta"):
        count = sum(p.numel() for p in getattr(transformers, cls)(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count} parameters")
    failed: Exception | None = None
    for batch in batches(kind, config, cls):
        try:
            loss = Tiny(cls, config).training_step(batch, 0)
            loss.backward()
            if not torch.isfinite(loss):
                raise ValueError(f"a loss of {float(loss)}")
        except Exception as error:
            failed = error
        else:
            return config, batch
    assert failed is not None
    raise failed
