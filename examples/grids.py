"""Fields on a grid, cut into patches: the weather of the next hour, or a video without its noise.

    python examples/train.py fit --config configs/weather_cpu.yaml
    python examples/train.py fit --config configs/video_cpu.yaml

Positions of patches are parameters for the whole grid, so the strategy splits the model in its blocks by itself.
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from series_mae import Block
from torch import Tensor, nn


class GridModel(L.LightningModule):
    """Attention among all patches of a grid of two dimensions (H, W) or three (T, H, W).

    Args:
        channels: Numbers at each point.
        size: Points along each dimension of the grid.
        patch: Points of a patch along each dimension.
        width: Of a patch inside the model.
        heads: Query heads.
        depth: Blocks.
    """

    def __init__(
        self, channels: int, size: list[int], patch: list[int], width: int = 32, heads: int = 4, depth: int = 2
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.patches = [points // part for points, part in zip(size, patch, strict=True)]
        flat: dict[int, Any] = {2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}
        cut, join = flat[len(size)]
        self.embed = cut(channels, width, tuple(patch), stride=tuple(patch))
        self.head = join(width, channels, tuple(patch), stride=tuple(patch))
        self.place = nn.Parameter(0.02 * torch.randn(math.prod(self.patches), width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, grid: Tensor) -> Tensor:
        """(B, channels, *size) -> the same shape."""
        # (B, width, *patches) -> (B, N, width)
        h = self.embed(grid).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            h = block(h)
        # (B, N, width) -> (B, width, *patches) -> (B, channels, *size)
        wanted: Tensor = self.head(h.transpose(1, 2).unflatten(2, self.patches))
        return wanted

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The mean squared error over all points."""
        loss = F.mse_loss(self(batch["given"]), batch["wanted"])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def weather(number: int) -> list[dict[str, Tensor]]:
    """Fields (2, 16, 32) of now and of the next hour: waves that wander east."""
    phase = 2 * math.pi * torch.rand(number, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    north, east = torch.arange(16)[:, None], torch.arange(32)
    wave = 2 * math.pi * (east / 32 + north / 16)
    return [{"given": torch.sin(wave + each), "wanted": torch.sin(wave + each - 0.5)} for each in phase]


def clips(number: int) -> list[dict[str, Tensor]]:
    """Videos (1, 8, 16, 16) with noise and without: a stripe that wanders."""
    generator = torch.Generator().manual_seed(0)
    phase = 2 * math.pi * torch.rand(number, 1, 1, 1, 1, generator=generator)
    time, column = torch.arange(8)[:, None, None], torch.arange(16)
    clean = torch.sin(phase + 2 * math.pi * (column + time) / 16).expand(-1, -1, -1, 16, -1)
    noise = torch.randn(clean.shape, generator=generator)
    return [{"given": clip + 0.5 * more, "wanted": clip} for clip, more in zip(clean, noise, strict=True)]
