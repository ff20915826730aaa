"""Tiny vision-language models of transformers, and batches of text with images."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import torch
from guests import Guest
from torch import Tensor

VOCAB, IMAGE, FIRST, LAST = 99, 90, 92, 93
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS = {**_TEXT, "head_dim": 8}
_SIGHT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 3,
}
_QWEN = {"patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 1, "depth": 2, "hidden_size": 32}
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 91,
    "vision_start_token_id": FIRST,
    "vision_end_token_id": LAST,
}
_ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}


def _settings() -> dict[str, dict[str, Any]]:
    """For each prefix of a class its configuration."""
    llama, siglip = {"model_type": "llama"}, {"model_type": "siglip_vision_model", "projection_dim": 32}
    full = {"layer_types": ["full_attention"] * 2}
    rope = {"rope_parameters": _ROPE}
    idefics = {"text_config": _TEXT | llama, "vision_config": _SIGHT, "image_token_id": IMAGE, "scale_factor": 2}
    return {
        "Qwen2VL": {
            "text_config": _TEXT | rope | full,
            "vision_config": _QWEN | {"embed_dim": 32, "num_heads": 4},
            **_QWEN_TOKENS,
        },
        "Qwen2_5_VL": {
            "text_config": _TEXT | rope | full,
            "vision_config": _QWEN
            | {"num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32, "window_size": 8}
            | {"fullatt_block_indexes": [1]},
            **_QWEN_TOKENS,
        },
        "Qwen3VL": {
            "text_config": _HEADS | {"rope_parameters": {**_ROPE, "mrope_interleaved": True}},
            "vision_config": _QWEN
            | {"num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 16}
            | {"deepstack_visual_indexes": [0, 1]},
            **_QWEN_TOKENS,
        },
        "Gemma3": {
            "text_config": _HEADS | {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
            "vision_config": _SIGHT,
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
            "boi_token_index": FIRST,
            "eoi_token_index": LAST,
        },
        "Llava": {
            "text_config": _TEXT | llama,
            "vision_config": _SIGHT | {"model_type": "clip_vision_model", "projection_dim": 32},
            "image_token_index": IMAGE,
            "image_seq_length": 16,
            "vision_feature_layer": -1,
        },
        "PaliGemma": {
            "text_config": _HEADS | {"model_type": "gemma"},
            "vision_config": _SIGHT | siglip,
            "image_token_index": IMAGE,
            "image_token_id": IMAGE,
            "projection_dim": 32,
            "hidden_size": 32,
        },
        "SmolVLM": {**idefics, "pad_token_id": 0},
        "Idefics3": {**idefics, "pad_token_id": 0},
        "InternVL": {
            "text_config": _TEXT | {"model_type": "qwen2"},
            "vision_config": _SIGHT | {"image_size": [8, 8], "patch_size": [2, 2]},
            "image_token_id": IMAGE,
            "image_seq_length": 4,
            "downsample_ratio": 0.5,
        },
        "Mistral3": {
            "text_config": _HEADS | {"model_type": "mistral"},
            "vision_config": _SIGHT | {"head_dim": 8, "model_type": "pixtral"},
            "image_token_index": IMAGE,
            "spatial_merge_size": 2,
        },
    }


FAMILIES = tuple(_settings())
_ABOUT = {
    "Qwen2VL": "positions of three dimensions, patches of all images in one row",
    "Qwen2_5_VL": "positions of three dimensions, windows in the tower",
    "Qwen3VL": "features of the tower added behind each block",
    "Gemma3": "images see all of themselves, local and global layers",
    "PaliGemma": "the prefix sees all of itself",
}


class Seeing(L.LightningModule):
    """A user's module around a vision-language model of transformers."""

    def __init__(self, family: str) -> None:
        super().__init__()
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**_settings()[family])
        for part in (config, config.text_config, config.vision_config):
            for key in [k for k, v in vars(part).items() if isinstance(v, float) and ("dropout" in k or "drop" in k)]:
                setattr(part, key, 0.0)
        self.model: Any = getattr(transformers, f"{family}ForConditionalGeneration")(config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def seeing(family: str) -> Any:
    """A picklable factory of `Seeing`."""
    return partial(Seeing, family)


def picture_text(
    family: str, seed: int, *, seq_len: int = 41, rows: int = 2, images: bool = True, padded: bool = True
) -> dict[str, Tensor]:
    """Text with one image of 16 patches in each row, of which the model makes 4 or 16 tokens."""
    generator = torch.Generator().manual_seed(seed)
    count = 16 if family in ("Llava", "PaliGemma") else 4
    tokens = torch.randint(3, 80, (rows, seq_len), generator=generator)
    mask, labels = torch.ones_like(tokens), tokens.clone()
    batch: dict[str, Tensor] = {}
    if images:
        for row in range(rows):
            begin = 3 + 4 * row + seed
            tokens[row, begin : begin + count + 2] = torch.tensor([FIRST, *[IMAGE] * count, LAST])
            labels[row, : begin + count + 2] = -100
        if family.startswith("Qwen"):
            batch["pixel_values"] = torch.randn(rows * 16, 12, generator=generator)
            batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * rows)
        else:
            shape = (rows, 1, 3, 8, 8) if family in ("SmolVLM", "Idefics3") else (rows, 3, 8, 8)
            batch["pixel_values"] = torch.randn(shape, generator=generator)
        if family == "Mistral3":
            batch["image_sizes"] = torch.tensor([[8, 8]] * rows)
    labels[:, : 2 + seed] = -100
    if padded:
        mask[0, -4:] = 0
        labels, tokens = labels.masked_fill(mask == 0, -100), tokens.masked_fill(mask == 0, 0)
    batch |= {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    if family in ("Gemma3", "PaliGemma"):
        batch["token_type_ids"] = (tokens == IMAGE).long()
    if family.startswith("Qwen"):
        batch["mm_token_type_ids"] = (tokens == IMAGE).int()
    return batch


SIGHTS = [
    Guest(
        f"transformers `{family}`",
        seeing(family),
        why=_ABOUT.get(family, ""),
        batches=[picture_text(family, seed) for seed in (1, 2)],
    )
    for family in FAMILIES
]
