"""Sources for streams, and what has been read from them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from lightning_ulysses.context import SequenceContext
from lightning_ulysses.data import PackedStream
from lightning_ulysses.data import stream as stream_module
from lightning_ulysses.exchange.mesh import SequenceMesh


class Documents:
    """Documents whose tokens are all different, so that a lost or doubled one shows."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __iter__(self) -> Iterator[dict[str, Any]]:
        begin = 1
        for length in self.lengths:
            yield {"input_ids": list(range(begin, begin + length)), "text": "left out"}
            begin += length


def random_lengths(count: int, mean: float, seed: int = 0, largest: int = 10**9) -> list[int]:
    values = np.random.default_rng(seed).lognormal(np.log(mean) - 0.5, 1.0, count)
    return np.clip(values.astype(int), 1, largest).tolist()


def as_worker(stream: PackedStream, worker: int, workers: int) -> list[Any]:
    with mock.patch.object(
        stream_module, "get_worker_info", return_value=SimpleNamespace(id=worker, num_workers=workers)
    ):
        return list(stream)


def documents_of(batches: list[Any]) -> list[list[int]]:
    """The documents in batches of raw packs."""
    return [document["input_ids"].tolist() for batch in batches for pack in batch for document in pack]


def counted(batches: list[Any]) -> list[list[int]]:
    """Those documents whose targets count."""
    kept = [[d for d in pack if (d["labels"] != -100).any()] for batch in batches for pack in batch]
    return documents_of([kept])


raw = partial(PackedStream, collate_fn=list)


def place(dp_size: int, dp_rank: int, sp_size: int = 2, sp_rank: int = 1) -> SequenceContext:
    return SequenceContext(
        SequenceMesh(dp_rank * sp_size + sp_rank, dp_size * sp_size, sp_size, sp_rank, dp_size, dp_rank)
    )


def shuffled() -> Iterator[dict[str, Any]]:
    """A generator function as people write it: shuffled by the global generators."""
    rows = list(Documents(list(range(1, 20))))
    random.shuffle(rows)
    for index in torch.randperm(len(rows)).tolist():
        yield {**rows[index], "weights": np.random.rand(len(rows[index]["input_ids"]))}
