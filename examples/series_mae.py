"""A masked autoencoder of time series: most patches are left out, and drawn anew in each step.

Run it with ``python examples/series_mae.py``. It trains a tiny encoder and a decoder on two CPU processes. The encoder
sees a quarter of the patches, the decoder all of them, with a learned token for those that were left out. So the two
stacks attend over sequences of two lengths, and the strategy splits both in their blocks by itself. It says so in one
line. Weather and video differ in what makes the patches: ``nn.Conv2d`` or ``nn.Conv3d`` in place of ``Linear``.

Source: arXiv 2111.06377.
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_ulysses  # noqa: F401  registers the strategies

PATCH, PATCHES, KEPT = 8, 64, 16


class Block(nn.Module):
    """Attention among all patches and a feed-forward layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        """(B, S, width) -> (B, S, width)."""
        # (B, S, 3 * H * D) -> (B, S, 3, H, D) -> (3, B, H, S, D)
        q, k, v = self.qkv(self.norm_1(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # (B, H, S, D) -> (B, S, H, D) -> (B, S, H * D)
        h = h + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + self.mlp(self.norm_2(h))


class MaskedAutoencoder(L.LightningModule):
    """Fills in the patches that it did not see."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(PATCH, width), nn.Linear(width, PATCH)
        self.place = nn.Parameter(0.02 * torch.randn(PATCHES, width))
        self.missing = nn.Parameter(torch.zeros(width))
        self.encoder = nn.ModuleList(Block(width, heads) for _ in range(2))
        self.decoder = nn.ModuleList(Block(width, heads) for _ in range(1))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The mean squared error over patches that were left out."""
        patches = batch["series"].unflatten(1, (PATCHES, PATCH))  # (B, N, patch)
        order = torch.rand(patches.shape[:2], device=patches.device).argsort(dim=1)  # (B, N)
        kept = order[:, :KEPT, None]
        h = self.embed(patches) + self.place
        # (B, N, width) -> (B, kept, width)
        seen = h.gather(1, kept.expand(-1, -1, h.shape[-1]))
        for block in self.encoder:
            seen = block(seen)
        # (B, kept, width) -> (B, N, width), with the missing token where nothing was seen
        h = (self.missing + self.place).expand_as(h).scatter(1, kept.expand_as(seen), seen)
        for block in self.decoder:
            h = block(h)
        is_missing = torch.ones_like(patches[..., :1]).scatter(1, kept, 0.0)
        errors = (self.head(h) - patches).square() * is_missing
        loss = errors.sum() / (is_missing.sum() * PATCH)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def series(number: int) -> list[dict[str, Tensor]]:
    """Rows (N * patch,): one wave, of another height in each."""
    height = 2 * torch.randn(number, 1, generator=torch.Generator().manual_seed(0))
    return [{"series": row} for row in height * torch.sin(torch.linspace(0, 6 * math.pi, PATCH * PATCHES))]


def main() -> None:
    """Trains on two processes."""
    L.seed_everything(0)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        max_epochs=4,
        strategy="ulysses_deepspeed",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    loader: DataLoader[Any] = DataLoader(series(160), batch_size=8)  # type: ignore[arg-type]
    trainer.fit(MaskedAutoencoder(), loader)
    if trainer.is_global_zero:
        print(f"loss {float(trainer.callback_metrics['loss']):.3f} after {trainer.global_step} steps")


if __name__ == "__main__":
    main()
