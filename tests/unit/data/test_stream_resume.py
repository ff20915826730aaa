"""Streams go on behind what was used, on any number of ranks, and in workers each where it was."""

from __future__ import annotations

import json
import pickle
from itertools import chain, islice
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from streams import Documents, counted, documents_of, random_lengths, raw, shuffled

from lightning_ulysses.data import PackedStream
from lightning_ulysses.data import stream as stream_module

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
