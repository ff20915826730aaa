"""Models from elsewhere than transformers' language models, for the zoo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from models import VOCAB, count_targets, hand_written, token_batch
from planned import lit
from torch import Tensor, nn

from lightning_ulysses import sequence_positions

HEIGHT, WIDTH, PATCH, CLASSES = 8, 16, 2, 5
TEXT = [token_batch(seed, 33, 2, "uneven") for seed in range(2)]


class Classifier(L.LightningModule):
    """A user's module around a model of images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch["images"]), batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class HubViT(Classifier):
    """transformers' ViT, with its own loss."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = ViTConfig(image_size=(HEIGHT, WIDTH), patch_size=PATCH, num_labels=CLASSES, **sizes)
        self.model = ViTForImageClassification(config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(pixel_values=batch["images"], labels=batch["labels"]).loss
        return loss


class ImageAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # (B, S, 3 * H * D) -> (B, S, 3, H, D) -> (3, B, H, S, D)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # (B, H, S, D) -> (B, S, H, D) -> (B, S, H * D)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ImageBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), ImageAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """With the names and the order of timm's: patches behind a class token, and learned positions for all of them."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        patches = (HEIGHT // PATCH) * (WIDTH // PATCH)
        self.patch_embed = nn.Conv2d(3, width, PATCH, PATCH)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, patches + 1, width))
        self.blocks = nn.Sequential(*(ImageBlock(width, heads) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        # (B, 3, height, width) -> (B, W, height / 2, width / 2) -> (B, patches, W)
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class TimmViT(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.model = VisionTransformer()


TOKENS = {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 3, "out_channels": 3, "num_layers": 2}
TEXT_WIDTH, TEXT_LENGTH = 8, 5
SQUARE = {"sample_size": 12, "patch_size": 2, "norm_num_groups": 1}
MEMORY = {"cross_attention_dim": 32, "caption_channels": TEXT_WIDTH}
# For each class of diffusers: its sizes, one sample, and what else its forward takes.
DIFFUSERS: dict[str, tuple[dict[str, Any], tuple[int, ...], dict[str, Any]]] = {
    "DiTTransformer2DModel": ({**TOKENS, **SQUARE, "num_embeds_ada_norm": 10}, (3, 12, 12), {}),
    "PixArtTransformer2DModel": (
        {**TOKENS, **SQUARE, **MEMORY, "use_additional_conditions": False},
        (3, 12, 12),
        {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "WanTransformer3DModel": (
        {
            **TOKENS,
            "attention_head_dim": 12,
            "patch_size": (1, 2, 2),
            "text_dim": TEXT_WIDTH,
            "freq_dim": 16,
            "ffn_dim": 32,
            "rope_max_seq_len": 64,
        },
        (3, 1, 6, 22),
        {},
    ),
    "LTXVideoTransformer3DModel": (
        {**TOKENS, **MEMORY},
        (33, 3),
        {"encoder_attention_mask": None, "num_frames": 1, "height": 3, "width": 11},
    ),
}


class Diffuser(L.LightningModule):
    """Learns noise with a transformer of diffusers; DiT draws which classes to leave out."""

    def __init__(self, name: str) -> None:
        super().__init__()
        import diffusers

        torch.manual_seed(0)
        sizes, _, self.more = DIFFUSERS[name]
        self.model = getattr(diffusers, name)(**sizes)
        for parameter in self.model.parameters():
            # Else the last layers, which begin with zeros, hide the others.
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        self.takes_classes = name.startswith("DiT")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        torch.manual_seed(0)
        about = {"class_labels": batch["classes"]} if self.takes_classes else {"encoder_hidden_states": batch["text"]}
        output = self.model(batch["noisy"], timestep=batch["time"], **about, **self.more).sample
        return F.mse_loss(output, batch["noise"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def noise_batches(name: str) -> list[dict[str, Tensor]]:
    """Of two rows and of one."""
    batches = []
    for rows in (2, 1):
        generator = torch.Generator().manual_seed(rows)
        shape = (rows, *DIFFUSERS[name][1])
        batches.append(
            {
                "noisy": torch.randn(shape, generator=generator),
                "noise": torch.randn(shape, generator=generator),
                "text": torch.randn(rows, TEXT_LENGTH, TEXT_WIDTH, generator=generator),
                "time": torch.randint(0, 9, (rows,), generator=generator),
                "classes": torch.randint(0, 9, (rows,), generator=generator),
            }
        )
    return batches


class XTransformer(L.LightningModule):
    """x-transformers, with absolute and rotary positions."""

    def __init__(self, told: bool = True, flash: bool = True) -> None:
        super().__init__()
        from x_transformers import Decoder, TransformerWrapper

        torch.manual_seed(0)
        layers = Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, rotary_pos_emb=True, attn_flash=flash)
        self.model, self.told = TransformerWrapper(num_tokens=VOCAB, max_seq_len=64, attn_layers=layers), told

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        tokens = batch["input_ids"]
        logits = self.model(tokens, pos=sequence_positions(tokens) if self.told else None)
        return F.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def x_transformer(**kwargs: Any) -> Any:
    """A picklable factory of `XTransformer`."""
    return partial(XTransformer, **kwargs)


def picture_batch(seed: int, rows: int) -> dict[str, Tensor]:
    """Images of 32 patches, with a class each."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, 3, HEIGHT, WIDTH, generator=generator)
    return {"images": images, "labels": torch.randint(0, CLASSES, (rows,), generator=generator)}


def count_rows(batch: dict[str, Tensor]) -> float:
    """Samples of a batch."""
    return float(len(next(iter(batch.values()))))


PICTURES = [picture_batch(1, 2), picture_batch(2, 3)]


@dataclass(frozen=True)
class Guest:
    """A row of the second table.

    Args:
        name: The model.
        make: Builds its LightningModule.
        plan: The strategy's ``plan``.
        exact: Whether it is; else it is refused.
        why: A part of the refusal; else what the row is about.
        batches: Two micro-batches.
        count: Over how many targets the loss of one is a mean.
    """

    name: str
    make: Callable[[], L.LightningModule]
    plan: Any = None
    exact: bool = True
    why: str = ""
    batches: list[Any] = field(default_factory=lambda: TEXT)
    count: Callable[[Any], float] = count_targets


GUESTS = [
    Guest("hand-written, with `sequence_positions`", hand_written(lr=0.1)),
    Guest("hand-written, with `torch.arange`", hand_written(positions="own", lr=0.1)),
    Guest(
        "hand-written, with `torch.arange`",
        hand_written(positions="own", lr=0.1),
        {"split": {"blocks.*": {"x": 1}}, "join": {"head": 1}},
    ),
    Guest("LitGPT `GPT`", lit(loss="given")),
    Guest("LitGPT `GPT`", lit(), "litgpt"),
    *(
        Guest(
            f"diffusers `{name}`",
            partial(Diffuser, name),
            "diffusers",
            batches=noise_batches(name),
            count=count_rows,
        )
        for name in DIFFUSERS
    ),
    Guest(
        "transformers `ViTForImageClassification`",
        HubViT,
        {"split": {"vit.layers.*": {"hidden_states": 1}}, "join": {"vit.layernorm": 1}},
        why="patches and a class token",
        batches=PICTURES,
        count=count_rows,
    ),
    Guest(
        "timm `VisionTransformer`",
        TimmViT,
        {"split": {"blocks.*": {"x": 1}}, "join": {"norm": 1}},
        why="patches and a class token",
        batches=PICTURES,
        count=count_rows,
    ),
    Guest(
        "x-transformers, `attn_flash=True`, `pos=sequence_positions(x)`",
        x_transformer(),
        why="absolute and rotary positions",
    ),
    Guest("x-transformers, `attn_flash=True`", x_transformer(told=False)),
    Guest(
        "x-transformers, `attn_flash=False`, `pos=sequence_positions(x)`",
        x_transformer(flash=False),
        why="attention on the whole sequence, the rest split",
    ),
]
