"""Saving where an epoch is, and going on from there, also on another number of ranks."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import every_token, lengths_of, ranks, sampler, tokens

from lightning_ulysses.data import CostModel
from lightning_ulysses.errors import UlyssesError


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.integers(1, 30), min_size=40, max_size=120),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=4),
    st.integers(0, 2),
    st.booleans(),
)
def test_resuming_on_other_ranks_loses_and_repeats_nothing(
    lengths: list[int], legs: list[tuple[int, int]], epoch: int, drop_last: bool
) -> None:
    seen: list[Any] = []
    state: Any = None
    for size, steps in [*legs, (1, 10**9)]:
        group = ranks(size, lengths, drop_last=drop_last)
        for one in group:
            one.set_epoch(epoch)
            if state is not None:
                one.load_state_dict(json.loads(json.dumps(state)))
                # As Lightning does when it resumes within the epoch.
                one.set_epoch(epoch)
        try:
            # Lightning asks for the length once, and for all epochs.
            assert len(group[0]) == len(ranks(size, lengths, drop_last=drop_last)[0])
        except UlyssesError:
            # Only for too few documents to go round, or if packs divided for the former ranks are left.
            too_few = len(lengths) - sum(map(len, seen)) < group[0]._plan.count - len(seen) + size
            assert too_few or len(state["segments"]) > 1
            return
        for together in islice(zip(*group, strict=True), steps):
            seen += together
        states = [one.state_dict() for one in group]
        assert all(other == states[0] for other in states)
        state = states[0]
        if state["epoch"] > epoch:
            break
    found, wanted = tokens(seen, lengths), every_token(lengths)
    assert found == wanted if not drop_last or size == 1 else found <= wanted


def test_an_epoch_with_too_little_left_for_all_ranks_is_over() -> None:
    lengths = lengths_of(200)
    one = sampler(lengths, drop_last=True)
    used = len(one) - 1
    two = ranks(2, lengths, drop_last=True)
    for each in two:
        each.load_state_dict(one.state_after(used))
        assert list(each) == [] and each.state_dict()["epoch"] == 1
        each.set_epoch(1)
        assert len(list(each)) > 1


def test_a_resumed_run_on_the_same_ranks_is_the_same_run() -> None:
    lengths = lengths_of(200)
    whole = list(sampler(lengths, place=(3, 1)))
    first = sampler(lengths, place=(3, 1))
    iterator = iter(first)
    begun = [next(iterator) for _ in range(4)]
    second = sampler(lengths, place=(3, 1))
    second.load_state_dict(first.state_dict())
    assert len(second) == len(whole)
    assert begun + list(second) == whole


def test_what_a_loader_fetched_ahead_is_not_used() -> None:
    lengths = lengths_of(200)
    first, second = sampler(lengths), sampler(lengths)
    whole = list(first)
    second.load_state_dict(first.state_after(5))
    assert list(second) == whole[5:]
    # The same in a resumed epoch, whose loader may be through with the sampler already.
    third = sampler(lengths)
    third.load_state_dict(second.state_after(2))
    assert list(third) == whole[7:]
    assert second.state_dict()["epoch"] == 1 and second.state_after(2)["epoch"] == 0


def test_length_counts_what_was_used_before() -> None:
    lengths = lengths_of(400)
    eight = sampler(lengths, place=(8, 0))
    state = eight.state_after(3)
    two = sampler(lengths, place=(2, 0))
    fresh = len(two)
    two.load_state_dict(state)
    assert len(two) == fresh and len(list(two)) == fresh - 3 * 8 // 2
    five = sampler(lengths, place=(5, 0))
    fresh = len(five)
    five.load_state_dict(state)
    assert len(five) == fresh == 3 * 8 // 5 + len(list(five))


def test_whole_batches_count_as_done() -> None:
    """The trainer counts batches: 3 of 2 packs on 4 ranks are 2 on 5 ranks, rounded down."""
    lengths = lengths_of(400)
    state = sampler(lengths, place=(4, 0)).state_after(6, items=2)
    five = sampler(lengths, place=(5, 0))
    fresh = len(five)
    five.load_state_dict(state)
    assert len(five) == fresh == 2 * 2 + len(list(five))


def test_states_between_and_after_epochs() -> None:
    lengths = lengths_of(200)
    one = sampler(lengths)
    one.set_epoch(4)
    iterator = iter(one)
    assert one.state_dict()["segments"] == []
    next(iterator)
    assert one.state_dict()["segments"] == [[1, 1]]
    middle = one.state_dict()
    list(iterator)
    over = one.state_dict()
    assert (over["epoch"], over["segments"]) == (5, [])
    # A later epoch starts at its beginning, whatever was loaded.
    one.load_state_dict(middle)
    one.set_epoch(5)
    fifth = list(one)
    assert len(fifth) == len(one)
    # Without set_epoch the epoch is first finished and then repeated.
    one.load_state_dict(middle)
    rest, again = list(one), list(one)
    assert again[1:] == rest
    one.load_state_dict(over)
    assert list(one) == fifth


def test_iterators_that_nobody_reads_use_nothing() -> None:
    lengths = lengths_of(200)
    one = sampler(lengths)
    whole = list(one)
    state = one.state_after(3)
    other = sampler(lengths)
    other.load_state_dict(state)
    iter(other), iter(other)
    assert other.state_dict() == state
    assert list(other) == whole[3:]


@pytest.mark.parametrize("change", ["dataset", "seed", "max_tokens", "cost", "nothing known"])
def test_states_of_other_runs_are_refused(change: str) -> None:
    lengths = lengths_of(50)
    state = sampler(lengths).state_dict()
    others = {
        "dataset": lambda: sampler(lengths[::-1]),
        "seed": lambda: sampler(lengths, seed=3),
        "max_tokens": lambda: sampler(lengths, max_tokens=101),
        "cost": lambda: sampler(lengths, cost=CostModel(2.0)),
        "nothing known": lambda: sampler(lengths),
    }
    other = others[change]()
    if change == "nothing known":
        state = {}
    with pytest.raises(UlyssesError) as caught:
        other.load_state_dict(state)
    assert str(state.get("fingerprint")) in caught.value.got
    assert other.state_dict()["fingerprint"] in caught.value.expected


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_torchdata_saves_and_loads_the_sampler(workers: int, size: int) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    lengths = lengths_of(60)

    def loader(size: int, rank: int) -> Any:
        one = sampler(lengths, place=(size, rank))
        return torchdata.StatefulDataLoader(
            one.packed, sampler=one, batch_size=None, collate_fn=lambda pack: pack, num_workers=workers
        )

    states, seen = [], []
    for rank in range(2):
        first = loader(2, rank)
        iterator = iter(first)
        seen += [next(iterator) for _ in range(3)]
        states.append(first.state_dict())
    for rank in range(size):
        second = loader(size, rank)
        second.load_state_dict(states[0])
        seen += list(second)
    assert Counter(number for pack in seen for number in pack) == Counter(range(60))
