"""What the ranks find together."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_ulysses.checks.trial.verdict import SliceReport, judge

COUNTS = {"labels": 3.0, "tokens": 4.0}


def group(*weights: float, half: bool = False) -> list[tuple[SliceReport, Any]]:
    """Slices with 3 and 1 labels of 4 and 4 tokens."""
    counts = [COUNTS, {"labels": 1.0, "tokens": 4.0}]
    return [(SliceReport(each, weight, is_half=half), ()) for each, weight in zip(counts, weights, strict=True)]


def silent(*, is_empty: bool) -> list[tuple[SliceReport, Any]]:
    return [(SliceReport(COUNTS, reason="no gradient", is_recorded=False, is_empty=is_empty), ())] * 2


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
