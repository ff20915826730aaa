"""Trains what a configuration names: its module, and rows that a function makes.

    python examples/train.py fit --config configs/dpo_cpu.yaml    # or proteins, genomics, series, weather, video

Your own program needs no more than this: `model` and `data` of the configuration name your classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader


class Rows(L.LightningDataModule):
    """Batches of rows, for examples that need no files.

    Args:
        make: Makes so many rows.
        number: Rows.
        batch_size: Rows of a batch.
    """

    def __init__(self, make: Callable[[int], list[Any]], number: int = 160, batch_size: int = 8) -> None:
        super().__init__()
        self.rows, self.batch_size = make(number), batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        """The rows in order."""
        return DataLoader(self.rows, batch_size=self.batch_size)  # type: ignore[arg-type]


if __name__ == "__main__":
    LightningCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        auto_configure_optimizers=False,
    )
