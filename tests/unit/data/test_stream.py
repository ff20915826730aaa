"""Streams packed on the fly: every token once, and the same number of batches on every rank."""

from __future__ import annotations

import importlib
import pickle
import random
from collections.abc import Iterator
from itertools import chain, islice
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import Documents, as_worker, counted, documents_of, place, random_lengths, raw, shuffled
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_ulysses import UlyssesError
from lightning_ulysses.context import activate
from lightning_ulysses.data import PackedStream, PackingCollator
from lightning_ulysses.data import stream as stream_module


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=60),
    max_tokens=st.integers(3, 20),
    replicas=st.integers(1, 4),
    rows=st.integers(1, 3),
    workers=st.integers(1, 3),
    buffered=st.integers(1, 6),
)
def test_every_token_once_and_as_many_batches_on_every_rank(
    lengths: list[int], max_tokens: int, replicas: int, rows: int, workers: int, buffered: int
) -> None:
    settings = {"rows_per_batch": rows, "buffer_tokens": buffered * max_tokens, "num_replicas": replicas}
    everything: list[Any] = []
    sizes = set()
    for rank in range(replicas):
        stream = raw(Documents(lengths), max_tokens, rank=rank, **settings)
        alone = list(stream)
        shares = [as_worker(stream, worker, workers) for worker in range(workers)]
        dealt = [shares[i % workers][i // workers] for i in range(len(alone))]
        assert documents_of(dealt) == documents_of(alone) and sum(map(len, shares)) == len(alone)
        sizes.add(len(alone))
        everything += alone
    assert len(sizes) == 1
    packs = [pack for batch in everything for pack in batch]
    assert all(1 <= len(batch) <= rows for batch in everything)
    assert all(0 < sum(len(d["input_ids"]) for d in pack) <= max_tokens for pack in packs)
    wanted = [
        row["input_ids"][begin : begin + max_tokens]
        for row in Documents(lengths)
        for begin in range(0, len(row["input_ids"]), max_tokens)
    ]
    assert sorted(counted(everything)) == sorted(wanted)


def test_dropping_the_last_round_keeps_the_batches_before_it() -> None:
    lengths = random_lengths(60, 5, largest=16)
    both = [
        [list(raw(Documents(lengths), 16, num_replicas=4, rank=rank, last_round=last)) for rank in range(4)]
        for last in ("spread", "drop")
    ]
    for spread, dropped in zip(*both, strict=True):
        assert len(dropped) in (len(spread), len(spread) - 1)
        assert documents_of(dropped) == documents_of(spread[: len(dropped)])
        assert all(sum(len(d["input_ids"]) for d in pack) > 8 for batch in dropped for pack in batch)


def test_documents_of_the_last_round_are_spread_before_anything_is_left_without_targets() -> None:
    shares = [list(PackedStream(Documents([3, 4, 2]), 9, num_replicas=4, rank=rank)) for rank in range(4)]
    tokens = [[batch["input_ids"][0, : batch["cu_seqlens"][1]].tolist() for batch in share] for share in shares]
    assert sorted(chain.from_iterable(tokens[:3])) == [[1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [len(share) for share in shares] == [1] * 4
    targets = [int((batch["shift_labels"] != -100).sum()) for share in shares for batch in share]
    assert sorted(targets[:3]) == [1, 2, 3] and targets[3] == 0
    assert (shares[3][0]["labels"] == -100).all()


def test_a_batch_without_targets_has_none_of_any_kind() -> None:
    row = {
        "input_ids": [1, 2, 3],
        "labels": [1, 2, 3],
        "shift_labels": [2, 3, 4],
        "loss_mask": [1, 1, 1],
        "kept": [5] * 3,
    }
    collate = PackingCollator(pad_to_multiple_of=None)
    share = next(iter(PackedStream([row], 4, num_replicas=2, rank=1, collate_fn=collate)))
    assert (share["labels"] == -100).all() and (share["shift_labels"] == -100).all()
    assert share["loss_mask"].sum() == 0 and share["kept"].tolist() == [[5, 5, 5]]


def test_packs_are_full() -> None:
    lengths = random_lengths(4000, 64, largest=1024)
    packs = list(raw(Documents(lengths), 1024))
    fill = [sum(len(d["input_ids"]) for d in pack) / 1024 for batch in packs for pack in batch]
    # Only those made after the source has ended may have room left.
    assert np.mean(fill[:-20]) > 0.999 and np.mean(fill) > 0.99


def test_no_document_waits_for_ever() -> None:
    """A document that fits nowhere well still comes out while the source runs on."""
    lengths = [50, 60] + [51] * 400
    order = documents_of(list(raw(Documents(lengths), 100)))
    assert {len(document) for document in order[:20]} >= {50, 60}


def test_workers_give_the_same_batches_in_the_same_order() -> None:
    stream = PackedStream(Documents(random_lengths(80, 6, largest=32)), 32, rows_per_batch=2)
    alone = list(DataLoader(stream, batch_size=None))
    workers = DataLoader(stream, batch_size=None, num_workers=2)
    assert len(alone) > 4
    for left, right in zip(alone, workers, strict=True):
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("context", [None, "fork", pytest.param("spawn", marks=pytest.mark.processes)])
def test_the_place_is_found_when_it_is_needed(context: str | None) -> None:
    """Also in a spawned worker, where no strategy exists."""
    lengths = random_lengths(30, 6, largest=16)
    stream = PackedStream(Documents(lengths), 16)
    explicit = list(PackedStream(Documents(lengths), 16, num_replicas=3, rank=2))
    workers = {"num_workers": 1, "multiprocessing_context": context} if context else {}
    activate(place(3, 2))
    try:
        found = list(DataLoader(stream, batch_size=None, **workers))
    finally:
        activate(None)
    assert [batch["input_ids"].tolist() for batch in found] == [batch["input_ids"].tolist() for batch in explicit]
    assert len(list(stream)) > 2 * len(found)


def test_pickled_before_the_strategy_exists_it_still_finds_its_place() -> None:
    stream = pickle.loads(pickle.dumps(raw(Documents([4] * 30), 16)))
    activate(place(2, 1))
    try:
        assert len(list(stream)) == 4
    finally:
        activate(None)


def test_random_sources_are_the_same_on_every_rank() -> None:
    found = []
    for rank in range(2):
        torch.manual_seed(rank), random.seed(rank), np.random.seed(rank)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
        iterator = iter(raw(shuffled, 40, num_replicas=2, rank=rank, buffer_tokens=40))
        batches = []
        for batch in iterator:
            batches.append(batch)
            # What the program draws in between does not change what the source draws.
            assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
            assert (np.random.get_state()[1] == before[2]).all()
            random.random() if rank else None
            before = before[0], random.getstate(), before[2]
        found.append(batches)
    assert sorted(counted(found[0] + found[1])) == [row["input_ids"] for row in Documents(list(range(1, 20)))]
    assert documents_of(list(raw(shuffled, 40))) != documents_of(list(raw(shuffled, 40, seed=1)))


def test_epochs() -> None:
    class Source(Documents):
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    stream = raw(shuffled, 40)
    first = documents_of(list(stream))
    stream.set_epoch(1)
    second = documents_of(list(stream))
    stream.set_epoch(0)
    assert documents_of(list(stream)) == first != second and sorted(first) == sorted(second)
    aware = raw(Source([3, 4]), 10)
    aware.set_epoch(5)
    list(aware)
    assert aware.source.epoch == 5


def test_the_epoch_reaches_workers_that_stay() -> None:
    stream = PackedStream(shuffled, 40)
    loader = DataLoader(stream, batch_size=None, num_workers=1, persistent_workers=True)
    epochs = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        epochs.append([batch["input_ids"].tolist() for batch in loader])
    assert epochs[0] == epochs[2] != epochs[1]


class SplitsItself(Documents, IterableDataset[Any]):
    """Reads a part in a dataloader worker and on a rank, as streaming datasets do."""

    distributed_env = SimpleNamespace(world_size=4, global_rank=1, num_nodes=1)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        env = self.distributed_env
        yield from list(super().__iter__())[worker * env.world_size + env.global_rank :: workers * env.world_size]


def test_sources_that_split_themselves_are_read_whole() -> None:
    source = SplitsItself([3] * 40)
    loader = DataLoader(
        PackedStream(source, 9, collate_fn=PackingCollator(pad_to_multiple_of=None)), batch_size=None, num_workers=2
    )
    assert sorted(torch.cat([batch["input_ids"][0] for batch in loader]).tolist()) == list(range(1, 121))
    assert source.distributed_env.world_size == 4


class BeginsAgain:
    """An iterator as litdata's: asked once more after its end, it starts over."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.place = lengths, 0

    def __iter__(self) -> BeginsAgain:
        self.place = 0
        return self

    def __next__(self) -> dict[str, Any]:
        if self.place == len(self.lengths):
            self.place = 0
            raise StopIteration
        self.place += 1
        return {"input_ids": [self.place] * self.lengths[self.place - 1]}


@pytest.mark.parametrize("count", [1, 16, 40])
def test_an_iterator_that_begins_again_is_read_once(count: int) -> None:
    stream = raw(BeginsAgain([3] * count), 8)
    for _ in range(2):
        assert sorted(map(tuple, documents_of(list(islice(stream, 100))))) == [(i,) * 3 for i in range(1, count + 1)]


def test_hugging_face_streaming_dataset() -> None:
    datasets = pytest.importorskip("datasets")

    def rows(shards: list[int]) -> Iterator[dict[str, Any]]:
        for shard in shards:
            for index in range(10):
                yield {"input_ids": [shard * 10 + index + 1] * 3}

    source = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1, 2, 3]}).shuffle(
        3, buffer_size=8
    )
    loader = DataLoader(PackedStream(source, 6, num_replicas=1, rank=0), batch_size=None, num_workers=2)
    epochs = []
    for epoch in range(2):
        loader.dataset.set_epoch(epoch)
        epochs.append([token for batch in loader for token in batch["input_ids"][0, :6:3].tolist()])
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(1, 41)) and epochs[0] != epochs[1]
    split = importlib.import_module("datasets.distributed").split_dataset_by_node
    with pytest.raises(UlyssesError, match="split_dataset_by_node"):
        PackedStream(split(source, 0, 2), 6)


@pytest.mark.parametrize(("overlong", "left"), [("truncate", (1, 15)), ("drop", (1, 25)), ("split", (0, 0))])
def test_overlong_documents(overlong: Any, left: tuple[int, int]) -> None:
    stream = raw(Documents([4, 25, 3]), 10, overlong=overlong)
    with mock.patch.object(stream_module, "rank_zero_warn") as warn:
        documents = documents_of(list(stream))
    pieces = {
        "truncate": [list(range(5, 15))],
        "drop": [],
        "split": [list(range(5, 15)), list(range(15, 25)), list(range(25, 30))],
    }
    assert sorted(documents) == [[1, 2, 3, 4], *pieces[overlong], [30, 31, 32]]
    assert stream.left_out == {"documents": left[0], "tokens": left[1]}
    if left[0]:
        assert (
            f"1 of 3 documents were longer than max_tokens=10; overlong='{overlong}' left out {left[1]}"
            in warn.call_args[0][0]
        )
    else:
        warn.assert_not_called()
