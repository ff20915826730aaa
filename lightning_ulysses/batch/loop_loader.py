"""Wraps a dataloader for a loop that is the user's own, which decides itself when it steps the optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from lightning_ulysses.batch.loader import SeededLoader
from lightning_ulysses.batch.same_length import SameLength
from lightning_ulysses.exchange.mesh import SequenceMesh


class LoopLoader(SeededLoader):
    """Each iteration is an epoch, which ends on all ranks with the same batch. Making it is a collective.

    Args:
        loader: Any dataloader.
        key: See `SeededLoader`.
        mesh: Sizes and groups.
        device: The device for collectives.
    """

    def __init__(self, loader: Any, key: tuple[object, ...], mesh: SequenceMesh, device: torch.device) -> None:
        super().__init__(loader, key, lambda: self._epoch_number)
        self._epoch_number = -1
        self._same_length = SameLength(mesh, device)
        self._most, self._asks = self._same_length.of_epoch(loader)

    def __len__(self) -> int:
        return len(self._loader) if self._most is None else min(len(self._loader), self._most)

    def __iter__(self) -> Iterator[Any]:
        self._epoch_number += 1
        return self._together()

    def _together(self) -> Iterator[Any]:
        source = islice(self._batches(), self._most)
        while True:
            batches = list(islice(source, 1))
            if not batches or (self._asks and not self._same_length.of_window(1)):
                break
            yield batches[0]
        # Another rank may have a batch left, and asks.
        if self._asks and not batches:
            self._same_length.of_window(0)
