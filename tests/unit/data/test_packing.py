"""Which documents share a pack, and which packs share a step."""

from __future__ import annotations

import tracemalloc
import zlib
from bisect import bisect_left, insort
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packs import Lengths, as_lists, lists, long_tailed, relaxed, shuffled

from lightning_ulysses.cost.model import CostModel
from lightning_ulysses.data.epoch_plan import PackingPlan, PackingSettings
from lightning_ulysses.data.packing import Ints, Overlong, best_fit, check_lengths, fit_to_packs, random_order
from lightning_ulysses.errors import UlyssesError


def plan(lengths: Ints, max_tokens: int, **kwargs: Any) -> PackingPlan:
    defaults: dict[str, Any] = {"overlong": "error", "window": 8, "cost": CostModel()}
    switches = {"shuffle": True, "seed": 0, "drop_last": False}
    return PackingPlan(lengths, PackingSettings(max_tokens, **{**defaults, **switches, **kwargs}))


def one_by_one(lengths: Lengths, max_tokens: int) -> list[int]:
    """Best-fit decreasing as it is usually written; the tokens of each pack, sorted."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = bisect_left(room, length)
        insort(room, (room.pop(place) if place < len(room) else max_tokens) - length)
    return sorted(max_tokens - left for left in room)


@relaxed
@given(lists, st.integers(60, 300))
def test_one_window_is_best_fit_decreasing(lengths: Lengths, max_tokens: int) -> None:
    array = np.array(lengths)
    packs = best_fit(array, np.arange(len(array)), max_tokens, 10**6)
    assert sorted(packs.sums(array).tolist()) == one_by_one(lengths, max_tokens)


@relaxed
@given(lists, st.integers(60, 300), st.integers(2, 20), st.integers(0, 5))
def test_every_piece_is_in_one_pack_that_holds_it(lengths: Lengths, max_tokens: int, window: int, epoch: int) -> None:
    array = np.array(lengths)
    packs = shuffled(array, max_tokens, window, epoch)
    assert sorted(packs.members.tolist()) == list(range(len(array)))
    assert packs.sizes.min() > 0
    sums = [sum(lengths[i] for i in pack) for pack in as_lists(packs)]
    assert packs.sums(array).tolist() == sums and max(sums) <= max_tokens
    for pack in as_lists(packs):
        assert [lengths[i] for i in pack] == sorted((lengths[i] for i in pack), reverse=True)


@pytest.mark.parametrize("max_tokens", [2_000, 40_000, 2**20])
def test_capacity_on_both_sides_of_each_width_of_integer(max_tokens: int) -> None:
    lengths = np.minimum(long_tailed(3000) * (max_tokens // 2000), max_tokens)
    packs = shuffled(lengths, max_tokens)
    assert packs.sums(lengths).max() <= max_tokens and packs.sums(lengths).sum() == lengths.sum()
    assert lengths.sum() / (len(packs) * max_tokens) > 0.98


@pytest.mark.parametrize(("window", "least"), [(8, 0.995), (64, 0.998)])
def test_packs_are_full(window: int, least: float) -> None:
    lengths = long_tailed(40_000)
    max_tokens = int(16 * lengths.mean())
    packs = shuffled(np.minimum(lengths, max_tokens), max_tokens, window)
    assert np.minimum(lengths, max_tokens).sum() / (len(packs) * max_tokens) >= least


def test_windows_keep_chance_in() -> None:
    lengths = long_tailed(4000)

    def companions(window: int, epoch: int) -> set[tuple[int, ...]]:
        return {tuple(sorted(pack)) for pack in as_lists(shuffled(lengths, 4000, window, epoch))}

    assert companions(8, 0) == companions(8, 0)
    assert len(companions(8, 0) & companions(8, 1)) < 0.05 * len(companions(8, 0))


def test_order_is_a_permutation_that_no_version_of_numpy_changes() -> None:
    assert random_order(10, 1, 2).tolist() == [5, 6, 9, 3, 2, 1, 0, 8, 4, 7]
    for count in (0, 1, 2, 255, 256, 1000):
        assert sorted(random_order(count, 5).tolist()) == list(range(count))
    assert random_order(100, 1).tolist() != random_order(100, 2).tolist()


@relaxed
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 30))
def test_split_covers_every_token_once(lengths: Lengths, max_tokens: int) -> None:
    pieces = fit_to_packs(np.array(lengths), max_tokens, "split")
    seen = [
        (int(i), token) for i, b, e in zip(pieces.index, pieces.begin, pieces.end, strict=True) for token in range(b, e)
    ]
    assert seen == [(i, token) for i, length in enumerate(lengths) for token in range(length)]
    assert pieces.lengths.max() <= max_tokens and pieces.lost_tokens == 0
    assert pieces.overlong == sum(length > max_tokens for length in lengths)


@pytest.mark.parametrize(
    ("overlong", "index", "end", "lost"),
    [("truncate", [0, 1, 2, 3], [3, 10, 10, 4], 7), ("drop", [0, 3], [3, 4], 27)],
)
def test_what_becomes_of_longer_documents(overlong: Overlong, index: Lengths, end: Lengths, lost: int) -> None:
    pieces = fit_to_packs(np.array([3, 12, 15, 4]), 10, overlong)
    assert pieces.index.tolist() == index and pieces.end.tolist() == end and not pieces.begin.any()
    assert pieces.overlong == 2 and pieces.lost_tokens == lost


@pytest.mark.parametrize(
    ("lengths", "documents", "words"),
    [
        ([], 0, "an empty dataset"),
        ([1, 2], 3, r"shape \(2,\) for a dataset of 3"),
        ([[1, 2]], 1, r"shape \(1, 2\)"),
        ([1.0, 2.0], 2, "type float64"),
        ([True, False], 2, "type bool"),
        ([1, None], 2, "type object"),
        ([3, 0, 0], 3, "a length of 0 for document 1 .2 documents"),
        ([3, 4, -5], 3, "a length of -5 for document 2"),
    ],
)
def test_lengths_that_cannot_be(lengths: Any, documents: int, words: str) -> None:
    with pytest.raises(UlyssesError, match=words):
        check_lengths(lengths, documents)


def test_lengths_of_any_integer_type() -> None:
    for dtype in (np.uint8, np.int32, np.uint64):
        assert check_lengths(np.array([1, 200], dtype=dtype), 2).dtype == np.int32
    assert check_lengths([1, 2**31], 2).tolist() == [1, 2**31]


@pytest.mark.parametrize(
    ("overlong", "words"),
    [("error", "document 1 of 12 tokens with max_tokens=10 .2 of 3 "), ("cut", "overlong='cut'")],
)
def test_longer_documents_refused(overlong: Any, words: str) -> None:
    with pytest.raises(UlyssesError, match=words):
        fit_to_packs(np.array([3, 12, 15]), 10, overlong)


def test_dropping_everything_is_refused() -> None:
    with pytest.raises(UlyssesError, match="all longer than max_tokens=10"):
        fit_to_packs(np.array([12, 15]), 10, "drop")


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([150, 400, 2000]), st.booleans())
@example(0, 2000, True)  # each epoch has packs of its own
@example(11944, 150, True)  # three epochs need more packs than there are, and take those of the first
def test_every_epoch_has_the_same_number_of_packs(seed: int, max_tokens: int, shuffle: bool) -> None:
    lengths = np.random.default_rng(seed).integers(1, 150, 400)
    made = plan(lengths, max_tokens, window=2, seed=seed, shuffle=shuffle)
    packs = [made.packs(epoch) for epoch in range(4)]
    assert {len(p) for p in packs} == {made.count}
    for p in packs:
        assert sorted(p.members.tolist()) == list(range(400)) and p.sums(lengths).max() <= max_tokens
    first, *others = map(as_lists, packs)
    # Shuffled epochs differ, except those whose own packs would be too many.
    needs_more = [len(made._pack(epoch)) > made.count for epoch in range(1, 4)]
    assert [other == first for other in others] == (needs_more if shuffle else [True] * 3)


def test_an_epoch_that_needs_more_packs_takes_those_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(0).integers(300, 700, 3000)
    made = plan(lengths, 1000, window=2)
    by_need = sorted((made._pack(epoch) for epoch in range(1, 8)), key=len)
    worse = next(epoch for epoch in range(1, 8) if len(made._pack(epoch)) > len(by_need[0]))
    pack = made._pack
    monkeypatch.setattr(made, "_pack", lambda epoch: pack(epoch) if epoch else by_need[0])
    monkeypatch.setitem(made.__dict__, "count", len(by_need[0]))
    assert as_lists(made.packs(worse)) == as_lists(by_need[0])


def test_report_counts_what_is_lost() -> None:
    lengths = np.array([3, 12, 15, 4, 9])
    made = plan(lengths, 10, overlong="drop", shuffle=False, drop_last=True)
    report = made.report(made.deal(0, (), 1))
    assert (report.documents, report.overlong, report.tokens, report.lost_tokens) == (5, 2, 16, 27)
    assert (report.packs, report.left_out, report.fill, report.imbalance) == (2, 0, 0.8, 1.0)
    two = plan(np.array([9, 9, 9]), 10, drop_last=True)
    report = two.report(two.deal(0, (), 2))
    assert (report.packs, report.left_out, report.tokens) == (2, 1, 18)


def test_fingerprint_names_everything_that_packs_depend_on() -> None:
    base: dict[str, Any] = {"overlong": "split", "window": 8, "cost": CostModel(), "seed": 0}
    lengths = np.array([3, 4])
    first = plan(lengths, 10, **base).fingerprint
    assert plan(np.array([3, 4], dtype=np.int64), 10, **base).fingerprint == first
    others = [plan(np.array([4, 3]), 10, **base), plan(lengths, 11, **base), plan(lengths, 10, **{**base, "seed": 1})]
    changes = [{"overlong": "drop"}, {"window": 9}, {"cost": CostModel(2)}, {"shuffle": False}, {"drop_last": True}]
    others += [plan(lengths, 10, **{**base, **change}) for change in changes]
    assert len({first, *(other.fingerprint for other in others)}) == len(others) + 1


def test_plans_are_those_of_earlier_versions() -> None:
    """A run that is resumed with a newer version goes on with the same packs."""
    found = []
    for window, overlong, max_tokens in ((8, "split", 400), (64, "truncate", 1500), (2, "drop", 90)):
        made = plan(long_tailed(3000), max_tokens, window=window, overlong=overlong, seed=3)
        dealt = made.deal(1, (), 4)
        packs = [made.pack(made.packs(1), number) for number in (0, 17)]
        found.append(zlib.crc32(repr((dealt.steps.tolist(), as_lists(dealt.packs), packs, made.fingerprint)).encode()))
    assert found == [3425836451, 1455530683, 2042207839]


def test_a_plan_takes_little_memory_for_each_document() -> None:
    lengths = np.minimum(long_tailed(2**21), 16_000).astype(np.int32)
    tracemalloc.start()
    try:
        made = plan(lengths, 4000, window=64, overlong="split")
        made.deal(0, (), 8)
        made.deal(1, (), 8)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # 4 bytes each for lengths, order and members; twice the latter where packs are split.
    assert most / len(lengths) < 60
