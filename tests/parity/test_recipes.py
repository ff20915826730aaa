"""Steps written for one process train exactly by default, wherever their sequence has to be split."""

from __future__ import annotations

import pytest
from exact import BOUND
from recipes import RECIPES

from lightning_ulysses import UlyssesDeepSpeedStrategy
from lightning_ulysses.testing import SplitRun, StepResult, compare, fit_single, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool
from lightning_ulysses.testing.runs import StepRecorder


def fit(rank: int, name: str, run: SplitRun) -> tuple[StepResult, str]:
    """The result of a recipe, and where its training step was split."""
    recipe, recorder = RECIPES[name], StepRecorder()
    trainer = split_trainer(run, [recorder])
    trainer.fit(recipe.make(), split_loader([recipe.batch(seed) for seed in (1, 2)], run, rank))
    assert isinstance(trainer.strategy, UlyssesDeepSpeedStrategy)
    return recorder.result(), trainer.strategy.core.split_of("train")


def wanted(name: str) -> StepResult:
    recipe = RECIPES[name]
    return fit_single(recipe.make, [[recipe.batch(seed) for seed in (1, 2)]], recipe.count)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(pool: ProcessPool, name: str) -> None:
    """Two micro-batches on two processes."""
    run = SplitRun(strategy=RECIPES[name].strategy, trainer={"accumulate_grad_batches": 2})
    reference = wanted(name)
    assert reference.step().norm() > 1e-4
    for result, split in pool.run(fit, name, run, world_size=2):
        assert compare(result, reference).largest <= BOUND, compare(result, reference)
        assert split == RECIPES[name].split


GROUPS = {"padded": 1, "shifted": 3, "dpo": 3, "nanogpt": 1, "weighted": 3, "vision": 3}


@pytest.mark.parametrize(("name", "stage"), GROUPS.items())
def test_two_groups(pool: ProcessPool, name: str, stage: int) -> None:
    run = SplitRun(4, 2, {**RECIPES[name].strategy, "stage": stage})
    reference = wanted(name)
    for result, _ in pool.run(fit, name, run, world_size=4):
        assert compare(result, reference).largest <= BOUND, compare(result, reference)
