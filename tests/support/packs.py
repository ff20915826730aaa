"""Lengths and packs for the tests."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_ulysses.data import Piece, SequenceShardSampler
from lightning_ulysses.data.packing import Ints, Packs, best_fit, random_order

Lengths = list[int]
relaxed = settings(deadline=None)
lists = st.lists(st.integers(1, 60), min_size=1, max_size=120)


def as_lists(packs: Packs) -> list[list[int]]:
    return [packs[number].tolist() for number in range(len(packs))]


def long_tailed(count: int, seed: int = 0) -> Ints:
    return np.random.default_rng(seed).lognormal(5, 1, count).astype(np.int64) + 1


def shuffled(lengths: Ints, max_tokens: int, window: int = 64, epoch: int = 0) -> Packs:
    return best_fit(lengths, random_order(len(lengths), epoch), max_tokens, window)


Tokens = Counter[tuple[int, int]]


def lengths_of(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, 60, count).tolist()


def sampler(lengths: Any, max_tokens: int = 100, place: tuple[int, int] | None = (1, 0), **kw: Any) -> Any:
    where = {} if place is None else {"num_replicas": place[0], "rank": place[1]}
    return SequenceShardSampler(range(len(lengths)), lengths, max_tokens, **{"window": 2, **where, **kw})


def ranks(size: int, lengths: Any, **kw: Any) -> list[Any]:
    return [sampler(lengths, place=(size, rank), **kw) for rank in range(size)]


def tokens(packs: list[Any], lengths: list[int]) -> Tokens:
    """How often each token (document, position) occurs."""
    found: Tokens = Counter()
    for pack in packs:
        for entry in pack:
            piece = entry if isinstance(entry, Piece) else Piece(entry, 0, lengths[entry])
            found.update((piece.index, position) for position in range(piece.begin, piece.end))
    return found


def every_token(lengths: list[int], most: int = 10**9) -> Tokens:
    return Counter((i, position) for i, length in enumerate(lengths) for position in range(min(length, most)))


def document_lengths(owner: Tensor) -> list[Tensor]:
    """For each row the tokens of its documents."""
    return [torch.bincount(row[row >= 0]) for row in owner]
