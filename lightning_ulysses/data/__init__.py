"""Documents packed into full rows, from a dataset or from a stream."""

from __future__ import annotations

from lightning_ulysses.cost.model import CostModel
from lightning_ulysses.data.collate import PackingCollator
from lightning_ulysses.data.datamodule import SequenceDataModule
from lightning_ulysses.data.packing import Piece
from lightning_ulysses.data.sampler import SequenceShardSampler
from lightning_ulysses.data.stream import PackedStream

__all__ = ["CostModel", "PackedStream", "PackingCollator", "Piece", "SequenceDataModule", "SequenceShardSampler"]
