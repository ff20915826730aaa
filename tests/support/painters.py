"""Transformers of diffusers in which a text and an image attend to each other, and one that is written by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HEADS = {"num_attention_heads": 3, "attention_head_dim": 12}
_ONE_OF_EACH = {**_HEADS, "num_layers": 2, "joint_attention_dim": 8}
# For each class of diffusers its sizes, and one sample. Images of 33 patches, but for those of square ones.
PAINTERS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "FluxTransformer2DModel": (
        {
            **_ONE_OF_EACH,
            "in_channels": 4,
            "num_single_layers": 2,
            "pooled_projection_dim": 6,
            "axes_dims_rope": (4,) * 3,
        },
        (33, 4),
    ),
    "SD3Transformer2DModel": (
        {
            **_ONE_OF_EACH,
            "sample_size": 22,
            "pos_embed_max_size": 16,
            "in_channels": 3,
            "out_channels": 3,
            "caption_projection_dim": 36,
            "pooled_projection_dim": 6,
        },
        (3, 6, 22),
    ),
    "HunyuanVideoTransformer3DModel": (
        {
            **_HEADS,
            "in_channels": 3,
            "out_channels": 3,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "guidance_embeds": False,
            "text_embed_dim": 8,
            "pooled_projection_dim": 6,
            "rope_axes_dim": (4, 4, 4),
        },
        (3, 1, 6, 22),
    ),
    "QwenImageTransformer2DModel": (
        {**_ONE_OF_EACH, "in_channels": 12, "out_channels": 3, "axes_dims_rope": (4, 4, 4)},
        (33, 12),
    ),
    "CogVideoXTransformer3DModel": (
        {
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "in_channels": 3,
            "out_channels": 3,
            "num_layers": 2,
            "time_embed_dim": 8,
            "text_embed_dim": 8,
            "sample_width": 22,
            "sample_height": 6,
            "sample_frames": 1,
            "max_text_seq_length": 7,
        },
        (1, 3, 6, 22),
    ),
    "AuraFlowTransformer2DModel": (
        {
            **_HEADS,
            "sample_size": 22,
            "in_channels": 3,
            "out_channels": 3,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "joint_attention_dim": 8,
            "caption_projection_dim": 36,
            "pos_embed_max_size": 64,
        },
        (3, 6, 22),
    ),
    "MochiTransformer3DModel": (
        {
            **_HEADS,
            "in_channels": 3,
            "num_layers": 2,
            "pooled_projection_dim": 12,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "max_sequence_length": 7,
        },
        (3, 1, 6, 22),
    ),
}


class Stream(nn.Module):
    """The half of a block that belongs to the image, or to the text."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        width = 8 * heads
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def start(self, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        # (B, S, 3 * H * D) -> (B, S, 3, H, D) -> three of (B, H, S, D)
        qkv = self.qkv(self.norm(x) * (1 + scale[:, None])).unflatten(-1, (3, self.heads, -1))
        return tuple(part.transpose(1, 2) for part in qkv.unbind(2))

    def end(self, x: Tensor, attended: Tensor) -> Tensor:
        # (B, H, S, D) -> (B, S, H, D) -> (B, S, H * D)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class DoubleBlock(nn.Module):
    """As in Flux's own code: weights of its own for each sequence, one attention for both."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.of_image, self.of_text = Stream(heads), Stream(heads)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        parts = zip(self.of_text.start(txt, vec), self.of_image.start(img, vec), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in parts)
        attended = F.scaled_dot_product_attention(turned(q, pe), turned(k, pe), v)
        text, image = attended.split([txt.shape[1], img.shape[1]], dim=2)
        return self.of_image.end(img, image), self.of_text.end(txt, text)


class SingleBlock(nn.Module):
    """The same weights for both, which stand one after the other."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.stream = Stream(heads)

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        q, k, v = self.stream.start(x, vec)
        return self.stream.end(x, F.scaled_dot_product_attention(turned(q, pe), turned(k, pe), v))


def turned(x: Tensor, pe: Tensor) -> Tensor:
    """x (B, H, S, D) turned by the angles pe (B, 1, S, D / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * pe.cos() - b * pe.sin(), a * pe.sin() + b * pe.cos()], -1)


class Streams(nn.Module):
    """An MM-DiT: blocks of two streams, then blocks of one."""

    def __init__(self, heads: int = 5) -> None:
        super().__init__()
        width = 8 * heads
        self.img_in, self.txt_in, self.time_in = nn.Linear(4, width), nn.Linear(8, width), nn.Linear(1, width)
        self.double_blocks = nn.ModuleList([DoubleBlock(heads) for _ in range(2)])
        self.single_blocks = nn.ModuleList([SingleBlock(heads) for _ in range(2)])
        self.out = nn.Linear(width, 4)

    def forward(self, noisy: Tensor, text: Tensor, time: Tensor) -> Tensor:
        img, txt, vec = self.img_in(noisy), self.txt_in(text), self.time_in(time[:, None] / 9)
        places = torch.cat([torch.zeros(txt.shape[1]), 1 + torch.arange(img.shape[1])])
        pe = (places[:, None] / torch.tensor([1.0, 3.0, 9.0, 27.0]))[None, None].expand(len(img), 1, -1, -1)
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe)
        x = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            x = block(x, vec=vec, pe=pe)
        return self.out(x[:, txt.shape[1] :])


class Painter(L.LightningModule):
    """Learns the noise of an image with its text."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        if name == "written":
            self.model: Any = Streams()
        else:
            import diffusers

            self.model = getattr(diffusers, name)(**PAINTERS[name][0])
        for parameter in self.model.parameters():
            # Else the last layers, which begin with zeros, hide the others.
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        self.name = name

    def _more(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        if self.name.startswith("Flux"):
            image = torch.stack([torch.arange(batch["noisy"].shape[1]) % each for each in (1, 5, 11)], -1)
            ids = {"img_ids": image, "txt_ids": torch.zeros(batch["text"].shape[1], 3)}
            return {**ids, "pooled_projections": batch["about"]}
        if self.name.startswith("SD3"):
            return {"pooled_projections": batch["about"]}
        if self.name.startswith("Hunyuan"):
            return {"pooled_projections": batch["about"], "encoder_attention_mask": batch["mask"]}
        if self.name.startswith("Mochi"):
            return {"encoder_attention_mask": batch["mask"]}
        if self.name.startswith("Qwen"):
            return {"img_shapes": [(1, 3, 11)] * len(batch["text"]), "encoder_hidden_states_mask": batch["mask"]}
        return {}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.name == "written":
            return F.mse_loss(self.model(batch["noisy"], batch["text"], batch["time"]), batch["noise"])
        given = {"encoder_hidden_states": batch["text"], "timestep": batch["time"], **self._more(batch)}
        output = self.model(batch["noisy"], **given).sample
        return F.mse_loss(output, batch["noise"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def painter(name: str) -> Any:
    """A picklable factory of `Painter`."""
    return partial(Painter, name)


def painting(name: str, seed: int, rows: int = 2, text: int = 7, padding: int = 2) -> dict[str, Tensor]:
    """Rows of an image with a text, whose last tokens may be padding."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, *(PAINTERS[name][1] if name in PAINTERS else (33, 4)))
    out = (rows, 33, 12) if name.startswith("Qwen") else shape
    mask = torch.ones(rows, text, dtype=torch.bool)
    mask[0, text - padding :] = False
    return {
        "noisy": torch.randn(shape, generator=generator),
        "noise": torch.randn(out, generator=generator),
        "text": torch.randn(rows, text, 8, generator=generator),
        "about": torch.randn(rows, 6, generator=generator),
        "time": torch.randint(0, 9, (rows,), generator=generator),
        "mask": mask,
    }
