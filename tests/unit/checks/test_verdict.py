"""What the ranks find together."""

from __future__ import annotations

import pytest

from lightning_ulysses.checks.trial.joints import Found, widest
from lightning_ulysses.checks.trial.outputs import Change
from lightning_ulysses.checks.trial.verdict import SliceReport, judge
from lightning_ulysses.geometry.joint import Joined

COUNTS = {"labels": 3.0, "tokens": 4.0}


def group(*weights: float, half: bool = False) -> list[SliceReport]:
    """Slices with 3 and 1 labels of 4 and 4 tokens."""
    counts = [COUNTS, {"labels": 1.0, "tokens": 4.0}]
    return [SliceReport(each, weight, is_half=half) for each, weight in zip(counts, weights, strict=True)]


def silent(*, is_empty: bool) -> list[SliceReport]:
    return [SliceReport(COUNTS, reason="no gradient", is_recorded=False, is_empty=is_empty)] * 2


def test_a_batch_without_targets_says_nothing() -> None:
    verdict = judge([*silent(is_empty=True), *group(0.75, 0.25)], 2)
    assert (
        verdict.names == {"labels"} and verdict.has_targets and verdict.is_recorded and verdict.weights == (0.75, 0.25)
    )
    alone = judge(silent(is_empty=True), 2)
    assert not alone.has_targets and not alone.is_recorded and alone.reason == "no gradient"


def test_an_excerpt_without_targets_is_not_such_a_batch() -> None:
    for found in (silent(is_empty=False), [*silent(is_empty=False), *group(0.75, 0.25)]):
        verdict = judge(found, 2)
        assert verdict.has_targets and verdict.reason == "no gradient" and not verdict.is_recorded


@pytest.mark.parametrize(
    ("weights", "half", "names"),
    [
        ((0.75, 0.25), False, {"labels"}),
        ((0.5, 0.5), False, {"tokens"}),
        ((0.751, 0.249), False, set()),
        ((0.76, 0.24), True, {"labels"}),
        ((0.9, 0.1), True, set()),
    ],
)
def test_counts_that_are_the_weights(weights: tuple[float, float], half: bool, names: set[str]) -> None:
    assert judge(group(*weights, half=half), 2).names == names


INNER, OUTER = (Found((name,), Joined({"x": 1}, {"": 1})) for name in ("encoder.layer.0.attention", "encoder"))


@pytest.mark.parametrize("order", [(INNER, OUTER), (OUTER, INNER)])
def test_what_is_joined_is_joined_on_all_ranks(order: tuple[Found, Found]) -> None:
    """Positions from 0 on are those of the first slice, and of no other one."""
    here, later = Change("attention", 0.1, place=3), Change("head", 0.1, place=7)
    reports = [SliceReport(COUNTS, moved=here, found=found) for found in order]
    assert judge(reports, 2).found is OUTER
    failed = [SliceReport(COUNTS, reason="", fails=True, found=found) for found in order]
    assert judge(failed, 2).found is OUTER
    # A rank whose first change lies further behind says nothing of this one.
    reports[order.index(OUTER)] = SliceReport(COUNTS, moved=later, found=OUTER)
    assert judge(reports, 2).found is INNER
    assert widest([INNER, None]) is None and widest([]) is None
