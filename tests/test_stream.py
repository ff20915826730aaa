"""Streams packed on the fly: every token once, the same number of batches on every rank, resumable anywhere."""

from __future__ import annotations

import importlib
import json
import pickle
import random
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.callbacks import ModelCheckpoint
from models import LlamaModule, count_targets, llama
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_ulysses import UlyssesError
from lightning_ulysses.data import PackedStream, PackingCollator, SequenceShardSampler
from lightning_ulysses.data import stream as stream_module
from lightning_ulysses.mesh import SequenceMesh
from lightning_ulysses.processes import ProcessPool
from lightning_ulysses.state import SequenceState, activate
from lightning_ulysses.testing import SplitRun, StepRecorder, compare, fit_single, split_trainer


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


def place(dp_size: int, dp_rank: int, sp_size: int = 2, sp_rank: int = 1) -> SequenceState:
    return SequenceState(
        SequenceMesh(dp_rank * sp_size + sp_rank, dp_size * sp_size, sp_size, sp_rank, dp_size, dp_rank)
    )


@pytest.mark.parametrize("context", [None, "fork", "spawn"])
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


def shuffled() -> Iterator[dict[str, Any]]:
    """A generator function as people write it: shuffled by the global generators."""
    rows = list(Documents(list(range(1, 20))))
    random.shuffle(rows)
    for index in torch.randperm(len(rows)).tolist():
        yield {**rows[index], "weights": np.random.rand(len(rows[index]["input_ids"]))}


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


RESUMED = {"max_tokens": 16, "buffer_tokens": 48}


@pytest.mark.parametrize("source", [Documents(random_lengths(50, 7, 1)), shuffled])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 3), (3, 2)])
def test_resume_loses_and_repeats_nothing(source: Any, before: int, after: int) -> None:
    def streams(replicas: int) -> list[PackedStream]:
        return [raw(source, num_replicas=replicas, rank=rank, **RESUMED) for rank in range(replicas)]

    everything = sorted(counted([batch for stream in streams(1) for batch in stream]))
    rounds = len(list(streams(before)[0]))
    assert rounds > 4
    for stop in range(rounds + 1):
        running = [(stream, iter(stream)) for stream in streams(before)]
        used = [next(iterator) for _, iterator in running for _ in range(stop)]
        states = [json.loads(json.dumps(stream.state_dict())) for stream, _ in running]
        rest = []
        for stream in streams(after):
            stream.load_state_dict(states[0])
            assert stream.state_dict() == states[0]
            rest.append(list(stream))
        assert all(state == states[0] for state in states) and len({len(share) for share in rest}) == 1
        assert sorted(counted([*used, *chain(*rest)])) == everything
        if before == after:
            following = [list(iterator) for _, iterator in running]
            assert [documents_of(share) for share in rest] == [documents_of(share) for share in following]


def test_a_finished_pass_is_followed_by_a_new_one() -> None:
    stream = raw(Documents([5] * 9), 10)
    whole = documents_of(list(stream))
    other = raw(Documents([5] * 9), 10)
    other.load_state_dict(stream.state_dict())
    assert documents_of(list(other)) == whole == documents_of(list(other))


def test_an_epoch_begun_afresh_forgets_a_loaded_state() -> None:
    stream = raw(Documents([5] * 9), 10)
    next(iter(stream))
    state = stream.state_dict()
    stream.load_state_dict(state)
    stream.set_epoch(0)
    assert len(list(stream)) == 4 and len(list(stream)) == 5
    stream.load_state_dict(state)
    stream.set_epoch(1)
    assert len(list(stream)) == 5


def test_workers_resume_each_where_it_was() -> None:
    """Without torchdata: what its workers do."""
    stream = raw(Documents(random_lengths(50, 7, 1)), num_replicas=2, rank=1, **RESUMED)
    alone = documents_of(list(stream))
    for stop in (0, 1, 3, 99):
        parts: list[list[Any]] = []
        for worker in range(2):
            copy = pickle.loads(pickle.dumps(stream))
            with mock.patch.object(
                stream_module, "get_worker_info", return_value=SimpleNamespace(id=worker, num_workers=2)
            ):
                iterator = iter(copy)
                used = list(islice(iterator, stop))
                resumed = pickle.loads(pickle.dumps(stream))
                resumed.load_state_dict(json.loads(json.dumps(copy.state_dict())))
                parts.append(used + list(resumed))
                if stop == 99:
                    assert used == parts[-1] and len(list(resumed)) == len(used)
        joined = [parts[i % 2][i // 2] for i in range(sum(map(len, parts)))]
        assert documents_of(joined) == alone


@pytest.mark.parametrize("workers", [0, 2])
def test_torchdata(workers: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> Any:
        stream = PackedStream(Documents(random_lengths(50, 7, 1)), 16, buffer_tokens=48, num_replicas=2, rank=0)
        return stateful.StatefulDataLoader(stream, batch_size=None, num_workers=workers)

    def tokens(batches: Any) -> list[Any]:
        return [batch["input_ids"].tolist() for batch in batches]

    whole = tokens(loader())
    for stop in (0, 1, 4, len(whole) - 1, len(whole)):
        first, second = loader(), loader()
        iterator = iter(first)
        used = tokens([next(iterator) for _ in range(stop)])
        second.load_state_dict(first.state_dict())
        assert used + tokens(second) == whole
        assert tokens(second) == whole


class CountTokens(pl.Callback):
    """What a rank is given in each epoch."""

    def __init__(self) -> None:
        self.seen: dict[int, list[Any]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        seen = self.seen.setdefault(trainer.current_epoch, [])
        seen.append((batch["input_ids"].tolist(), trainer.strategy.mesh.sp_rank))


# Their tokens are numbered from 1 on, and the vocabulary has 61.
STREAMED = [7, 9, 1, 5, 12, 2, 10, 3, 8]


def fit_stream(
    rank: int, run: SplitRun, workers: int, callbacks: tuple[pl.Callback, ...] = (), path: str | None = None
) -> Any:
    recorder, counter = StepRecorder(), CountTokens()
    stream = PackedStream(Documents(STREAMED), 16, buffer_tokens=32, collate_fn=PackingCollator(pad_to_multiple_of=4))
    loader = DataLoader(stream, batch_size=None, num_workers=workers)
    # Lightning's default would inject a sampler into any dataset that takes one.
    trainer = split_trainer(
        SplitRun(run.world_size, run.sp_size, run.strategy, {**run.trainer, "use_distributed_sampler": True}),
        [recorder, counter, *callbacks],
    )
    trainer.fit(LlamaModule(lr=0.1), loader, ckpt_path=path)
    return recorder.result(), counter.seen


def reference_steps(replicas: int) -> list[list[dict[str, Tensor]]]:
    """The documents of every round, each a batch of its own."""
    shares = [
        list(raw(Documents(STREAMED), 16, buffer_tokens=32, num_replicas=replicas, rank=r)) for r in range(replicas)
    ]
    steps = []
    for round_ in zip(*shares, strict=True):
        kept = [d for batch in round_ for pack in batch for d in pack if (d["labels"] != -100).any()]
        steps.append([{key: value[None] for key, value in document.items()} for document in kept])
    return steps


@pytest.mark.parametrize(("sizes", "workers"), [((4, 2), 0), ((2, 2), 0)])
def test_training_on_a_stream(pool: ProcessPool, sizes: tuple[int, int], workers: int) -> None:
    world, sp = sizes
    reference = fit_single(llama(lr=0.1), reference_steps(world // sp), count_targets)
    results = pool.run(fit_stream, SplitRun(world, sp), workers, world_size=world)
    for result, _ in results:
        assert compare(result, reference).largest <= 1e-5
    for group in range(world // sp):
        # The slices of a sequence-parallel group, joined again.
        slices = [results[group * sp + i][1][0] for i in range(sp)]
        assert len({len(part) for part in slices}) == 1 == len({len(results[0][1][0]), len(slices[0])})
    assert given_tokens(results) == list(range(1, sum(STREAMED) + 1))


def given_tokens(results: list[Any]) -> list[int]:
    """The tokens that all ranks together were given, without padding, in order of size."""
    return sorted(t for _, epochs in results for seen in epochs.values() for row, _ in seen for t in row[0] if t)


def interrupt_stream(rank: int, folder: str, first: int, second: int) -> Any:
    """One step of a stream on groups of ``first``, and the rest of it on groups of ``second``."""
    saver = ModelCheckpoint(dirpath=folder, filename="middle", every_n_train_steps=1)
    stop = {"max_steps": 1, "enable_checkpointing": True}
    before = fit_stream(rank, SplitRun(4, first, trainer=stop), 0, (saver,))
    return before, fit_stream(rank, SplitRun(4, second), 0, path=f"{folder}/middle.ckpt")


@pytest.mark.parametrize(("first", "second"), [(2, 2), (2, 4), (4, 4)])
def test_a_trainer_resumes_within_a_stream(pool: ProcessPool, tmp_path: Path, first: int, second: int) -> None:
    results = pool.run(interrupt_stream, str(tmp_path), first, second, world_size=4)
    before, after = ([result[part] for result in results] for part in range(2))
    assert 0 < len(given_tokens(before)) < sum(STREAMED)
    assert sorted(given_tokens(before) + given_tokens(after)) == list(range(1, sum(STREAMED) + 1))


class Once:
    """An iterator that cannot begin again."""

    def __init__(self) -> None:
        self.rows = iter(Documents([3, 4]))

    def __iter__(self) -> Once:
        return self

    def __next__(self) -> Any:
        return next(self.rows)


def read_before() -> None:
    stream = raw(Once(), 4)
    assert len(list(stream)) == 2
    list(stream)


def elsewhere() -> None:
    activate(place(2, 0))
    try:
        list(raw(Documents([1]), 4, num_replicas=3, rank=1))
    finally:
        activate(None)


BAD: dict[str, tuple[Any, str]] = {
    "a generator": (lambda: raw(iter(Documents([1])), 4), "can be read only once.*generator function itself"),
    "an iterator": (lambda: raw(map(str, [1]), 4), "source of type map, which can be read only once"),
    "read before": (read_before, "0 documents"),
    "no source": (lambda: raw(3, 4), "a source of type int"),
    "max_tokens": (lambda: raw(Documents([1]), 0), "max_tokens=0"),
    "no number": (lambda: raw(Documents([1]), "4"), "max_tokens='4'"),
    "buffer": (lambda: raw(Documents([1]), 4, buffer_tokens=3), "buffer_tokens=3.*at least 4"),
    "rows": (lambda: raw(Documents([1]), 4, rows_per_batch=0), "rows_per_batch=0"),
    "overlong": (lambda: raw(Documents([1]), 4, overlong="cut"), "overlong='cut'.*truncate"),
    "last_round": (lambda: raw(Documents([1]), 4, last_round="pad"), "last_round='pad'"),
    "another place": (elsewhere, r"\(3, 1\).*data-parallel rank 0 of 2"),
    "half a place": (lambda: raw(Documents([1]), 4, num_replicas=2), "rank=None"),
    "no such rank": (lambda: raw(Documents([1]), 4, num_replicas=2, rank=2), "rank=2"),
    "empty": (lambda: list(raw(Documents([]), 4)), "0 documents.*yields documents"),
    "all dropped": (lambda: list(raw(Documents([5, 6]), 4, overlong="drop")), "2 documents, 2 of them overlong"),
    "a rank with no pack": (
        lambda: list(raw(Documents([3, 3]), 4, num_replicas=3, rank=0, last_round="drop")),
        "2 documents.*makes 2 packs.*each of 3 data-parallel ranks.*last_round",
    ),
    "too long": (lambda: list(raw(Documents([2, 5]), 4, overlong="error")), "document 1 of the source with 5 tokens"),
    "bad row": (lambda: list(raw([{"tokens": [1]}], 4)), "without input_ids"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(UlyssesError, match=message):
        call()


def test_there_is_no_length() -> None:
    stream = raw(Documents([1, 2]), 4)
    with pytest.raises(TypeError, match=r"PackedStream has no length.*max_steps.*SequenceShardSampler"):
        len(DataLoader(stream, batch_size=None))
    assert stream and list(stream) and sized_len(DataLoader(stream, batch_size=None)) is None
    with pytest.raises(UlyssesError, match="PackedStream without a length"):
        SequenceShardSampler(stream, [1, 2], 4)


def test_rows_shorter_than_the_group_are_refused() -> None:
    activate(place(2, 0, sp_size=8))
    try:
        with pytest.raises(UlyssesError, match="max_tokens=4 with sp_size=8"):
            list(raw(Documents([1]), 4))
    finally:
        activate(None)


def state_after(batches: int, **settings: Any) -> dict[str, Any]:
    stream = raw(Documents([5] * 9), **{"max_tokens": 10, "buffer_tokens": 20, **settings})
    iterator = iter(stream)
    for _ in range(batches):
        next(iterator)
    return stream.state_dict()


def test_states_of_other_settings_or_sources_are_refused() -> None:
    with pytest.raises(UlyssesError, match=r"'max_tokens': 10.*'max_tokens': 12"):
        raw(Documents([5] * 9), 12).load_state_dict(state_after(2))
    with pytest.raises(UlyssesError, match=r"'seed': 0.*'seed': 1"):
        raw(Documents([5] * 9), 10, buffer_tokens=20, seed=1).load_state_dict(state_after(2))
    for lengths in ([5] * 3, [5, 4] * 9, [6] + [5] * 8):
        other = raw(Documents(lengths), 10, buffer_tokens=20)
        other.load_state_dict(state_after(2))
        with pytest.raises(UlyssesError, match=r"checksum [0-9a-f]{8}.*checksum [0-9a-f]{8}"):
            list(other)


def test_a_state_of_one_process_is_refused_by_workers() -> None:
    stream = raw(Documents([5] * 9), 10, buffer_tokens=20)
    stream.load_state_dict(state_after(2))
    with pytest.raises(UlyssesError, match=r"'workers': 0.*'workers': 2.*StatefulDataLoader"):
        as_worker(stream, 0, 2)
