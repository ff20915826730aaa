"""What a stream refuses, and how it says so."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.fabric.utilities.data import sized_len
from streams import Documents, as_worker, place, raw
from torch.utils.data import DataLoader

from lightning_ulysses import UlyssesError
from lightning_ulysses.context import activate
from lightning_ulysses.data import SequenceShardSampler


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
