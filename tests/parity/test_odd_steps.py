"""Losses and heads in which tokens meet are exact by default."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from exact import BOUND, fit_broken
from nightly import sampled
from odd_steps import MEANS, STEPS, Odd
from recipe_batches import unpadded
from recipes import one, valid

from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool


def uneven() -> list[Any]:
    """Two micro-batches with other numbers of labels."""
    batches = [unpadded(seed) for seed in (1, 2)]
    batches[1]["labels"][:2, 10:30] = -100
    return batches


@pytest.mark.parametrize("name", sampled(STEPS, 10, ["scaled_to_all"]))
def test_step(pool: ProcessPool, name: str) -> None:
    counts = (valid, one) if name in MEANS else (one, valid)
    # A step may write to its batch.
    wanted, other = (fit_single(partial(Odd, name), [uneven()], count) for count in counts)
    # The weights of the other kind make another step.
    assert compare(other, wanted).largest > 1e-3
    for result in fit_split(pool, partial(Odd, name), uneven(), SplitRun(trainer={"accumulate_grad_batches": 2})):
        assert compare(result, wanted).largest <= BOUND, compare(result, wanted)


def test_a_small_difference_is_seen(pool: ProcessPool) -> None:
    """Control: a trial that takes it for rounding leaves another step."""
    make, run = partial(Odd, "scaled_to_all"), SplitRun(trainer={"accumulate_grad_batches": 2})
    wanted = fit_single(make, [uneven()], valid)
    mechanism = "lightning_ulysses.checks.trial.verdict.INPUTS"
    for result in pool.run(fit_broken, make, uneven(), run, mechanism, 1e-3, world_size=2):
        assert compare(result, wanted).largest > 1e-5
