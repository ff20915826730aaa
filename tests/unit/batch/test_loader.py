"""Random numbers of a loader, accumulation windows, and resuming within an epoch."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_ulysses.batch.loader import SeededLoader, TrainLoader
from lightning_ulysses.errors import UlyssesError

INFINITE = float("inf")


class Augmented(Dataset[Tensor]):
    """Items with numbers from all three generators; what is fixed comes first."""

    def __init__(self, size: int = 6) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index), float(torch.rand(())), random.random(), np.random.rand()])


class Stream(IterableDataset[int]):
    def __init__(self, size: int = 5) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        yield from range(self.size)


def augmented(workers: int) -> DataLoader[Tensor]:
    context = "fork" if workers else None
    return DataLoader(Augmented(), batch_size=2, num_workers=workers, multiprocessing_context=context)


def seeded(*key: object, epoch: int = 0, workers: int = 0) -> SeededLoader:
    return SeededLoader(augmented(workers), key, lambda: epoch)


def train_loader(source: Any, window: int = 1, limit: float = INFINITE, dp_size: int = 1, **kwargs: Any) -> TrainLoader:
    settings = {"count": lambda batch: {"y": float(batch), "tokens": 1.0}, **kwargs}
    return TrainLoader(source, (7,), lambda: 0, window=window, limit=lambda: limit, dp_size=dp_size, **settings)


def values(loader: Any) -> Tensor:
    return torch.stack(list(loader))


def generators() -> list[Any]:
    numpy_state: Any = np.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), numpy_state[1].tolist(), numpy_state[2]]


@pytest.mark.parametrize("workers", [0, 2])
def test_random_numbers_follow_the_key_and_the_epoch(workers: int) -> None:
    first = values(seeded(1, 0, "train", workers=workers))
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    assert torch.equal(values(seeded(1, 0, "train", workers=workers)), first)
    others = [seeded(1, 1, "train", workers=workers), seeded(1, 0, "train", epoch=1, workers=workers)]
    for other in (values(loader) for loader in others):
        assert torch.equal(other[..., 0], first[..., 0])
        assert (other[..., 1:] != first[..., 1:]).all()
    # Neither do batches of one loader repeat each other.
    assert first[..., 1:].unique().numel() == first[..., 1:].numel()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_random_numbers_of_the_process_are_left_alone(workers: int) -> None:
    torch.manual_seed(1)
    before = generators()
    drawn = []
    for index, batch in enumerate(seeded(3, workers=workers)):
        assert generators() == before, index
        drawn.append(batch)
    assert generators() == before and len(drawn) == 3


def test_what_is_drawn_between_batches_changes_nothing() -> None:
    quiet = values(seeded(2))
    noisy = []
    for batch in seeded(2):
        torch.rand(5), random.random(), np.random.rand()
        noisy.append(batch)
    assert torch.equal(torch.stack(noisy), quiet)


def test_a_shuffle_follows_the_key() -> None:
    def order(*key: object, epoch: int = 0) -> list[int]:
        return [int(x) for x in SeededLoader(DataLoader(range(20), batch_size=None, shuffle=True), key, lambda: epoch)]

    assert order(1) == order(1) and sorted(order(1)) == list(range(20))
    assert order(1) != order(2) and order(1) != order(1, epoch=1)


def test_attributes_are_forwarded() -> None:
    inner = DataLoader(Augmented(), batch_size=2)
    loader = SeededLoader(inner, (), lambda: 0)
    assert loader.dataset is inner.dataset and loader.sampler is inner.sampler and loader.batch_size == 2
    assert len(loader) == 3
    assert not hasattr(loader, "nonsense") and not hasattr(loader, "__nonsense__")
    assert copy.copy(loader).dataset is inner.dataset
    with pytest.raises(AttributeError, match="nonsense"):
        _ = loader.nonsense


def test_a_stream_has_no_length() -> None:
    loader = train_loader(DataLoader(Stream(), batch_size=None), window=2)
    with pytest.raises(TypeError):
        len(loader)
    assert list(loader) == [0, 1, 2, 3, 4]
    assert [plan.size for plan in loader.plans] == [2, 2, 1]


@pytest.mark.parametrize(
    ("window", "limit", "sizes"),
    [
        (1, 5, [1, 1, 1, 1, 1]),
        (2, 5, [2, 2, 1]),
        (2, INFINITE, [2, 2, 1]),
        (5, 5, [5]),
        (8, 5, [5]),
        # The loop stops at the limit; a batch that it asks for beyond that opens a window of its own.
        (2, 3, [2, 1, 1, 1]),
        (4, 2, [2, 1, 1, 1]),
    ],
)
def test_windows(window: int, limit: float, sizes: list[int]) -> None:
    loader = train_loader([1, 2, 3, 4, 5], window, limit)
    assert list(loader) == [1, 2, 3, 4, 5]
    position = 0
    for plan, size in zip(loader.plans, sizes, strict=True):
        batches = [1, 2, 3, 4, 5][position : position + size]
        position += size
        assert plan.size == size
        # A window of one is counted when it is used.
        assert plan.counts == (tuple({"y": float(b), "tokens": 1.0} for b in batches) if size > 1 else ())
        assert plan.totals == ({"y": float(sum(batches)), "tokens": float(size)} if size > 1 else {})


def test_totals_of_batches_that_hold_different_tensors() -> None:
    loader = train_loader([{"a": 1.0}, {"a": 2.0, "b": 3.0}], window=2, count=lambda batch: batch)
    assert len(list(loader)) == 2
    # A sum over some of them would be taken for that of all.
    assert loader.plans[0].totals == {"a": 3.0}


def test_a_plan_is_there_before_its_first_batch() -> None:
    loader = train_loader([1, 2, 3, 4, 5], window=2)
    seen = [(batch, [plan.size for plan in loader.plans]) for batch in loader]
    assert seen == [(1, [2]), (2, [2]), (3, [2, 2]), (4, [2, 2]), (5, [2, 2, 1])]


def test_an_epoch_begins_without_the_plans_of_the_last() -> None:
    loader = train_loader([1, 2, 3], window=2)
    iterator = iter(loader)
    next(iterator)
    assert list(loader) == [1, 2, 3] and [plan.size for plan in loader.plans] == [2, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_windows_do_not_change_the_random_numbers(workers: int) -> None:
    def make(window: int) -> TrainLoader:
        return train_loader(augmented(workers), window, count=lambda batch: {"tokens": 2.0})

    assert torch.equal(values(make(1)), values(make(2)))


def test_only_batches_that_were_used_count_as_consumed() -> None:
    loader = train_loader([1, 2, 3, 4, 5], window=2, limit=5)
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    for _ in range(3):
        loader.advance()
    assert {"batches": 3, "dp_size": 1, "is_over": False}.items() <= loader.state_dict().items()


def test_nothing_is_skipped_after_a_whole_epoch() -> None:
    loader = train_loader([1, 2, 3], limit=3)
    for _ in loader:
        loader.advance()
    assert loader.state_dict()["batches"] == 0


@pytest.mark.parametrize("window", [1, 2])
def test_resuming_within_an_epoch(window: int) -> None:
    def make() -> TrainLoader:
        source = DataLoader(Augmented(7), batch_size=None)
        return train_loader(source, window, 7, count=lambda batch: {"tokens": 1.0})

    whole = values(make())
    loader = make()
    loader.load_state_dict({"batches": 2, "dp_size": 1})
    assert loader.state_dict()["batches"] == 2
    assert torch.equal(values(loader), whole[2:])
    assert [plan.size for plan in loader.plans] == ([1] * 5 if window == 1 else [2, 2, 1])
    loader.advance()
    assert loader.state_dict()["batches"] == 3
    # Only the epoch that was interrupted is continued.
    assert len(list(loader)) == 7


def test_resuming_on_another_number_of_ranks() -> None:
    state = {"batches": 6, "dp_size": 2}
    for dp_size, skipped in ((1, 12), (2, 6), (4, 3)):
        loader = train_loader(list(range(20)), dp_size=dp_size)
        loader.load_state_dict(state)
        assert next(iter(loader)) == skipped
    with pytest.raises(UlyssesError) as caught:
        train_loader([], dp_size=5).load_state_dict(state)
    assert all(part in str(caught.value) for part in ("after 6 batches on 2 data-parallel ranks", "5 ranks"))
