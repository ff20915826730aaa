"""Steps written for one process train exactly by default, wherever their sequence has to be split."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from exact import BOUND
from lightning.pytorch import Callback, LightningModule, Trainer
from models import VOCAB, HandWritten, LlamaModule, count_targets, pair_batch, token_batch
from nightly import mostly, sampled
from recipes import RECIPES
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_ulysses import UlyssesDeepSpeedStrategy
from lightning_ulysses.geometry.shares import even_shares
from lightning_ulysses.testing import SplitRun, StepResult, compare, fit_single, fit_split, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool
from lightning_ulysses.testing.runs import StepRecorder


def batches(name: str, rows: int | None) -> list[Any]:
    """Two batches of a recipe, or their first rows."""
    found = [RECIPES[name].batch(seed) for seed in (1, 2)]
    return tree_map(lambda leaf: leaf[:rows] if isinstance(leaf, Tensor) else leaf, found)


def fit(rank: int, name: str, run: SplitRun, rows: int | None = None) -> tuple[StepResult, str]:
    """The result of a recipe, and where its training step was split."""
    recorder = StepRecorder()
    trainer = split_trainer(run, [recorder])
    trainer.fit(RECIPES[name].make(), split_loader(batches(name, rows), run, rank))
    assert isinstance(trainer.strategy, UlyssesDeepSpeedStrategy)
    return recorder.result(), trainer.strategy.core.split_of("train")


def wanted(name: str, rows: int | None = None) -> StepResult:
    return fit_single(RECIPES[name].make, [batches(name, rows)], RECIPES[name].count)


@pytest.mark.parametrize("name", sampled(RECIPES, 2))
def test_recipe(pool: ProcessPool, name: str) -> None:
    """Two micro-batches on two processes."""
    run = SplitRun(strategy=RECIPES[name].strategy, trainer={"accumulate_grad_batches": 2})
    reference = wanted(name)
    assert reference.step().norm() > 1e-4
    for result, split in pool.run(fit, name, run, world_size=2):
        assert compare(result, reference).largest <= BOUND, compare(result, reference)
        assert split == RECIPES[name].split


@pytest.mark.parametrize(
    ("name", "split"),
    [("padded", "auto"), ("packed", "blocks"), ("shifted", "auto"), ("weighted", "auto"), ("z_loss", "auto")],
)
def test_batches_of_one_row(pool: ProcessPool, name: str, split: str) -> None:
    """Rows or documents tell which targets weight a loss that needs the whole sequence; a batch may have one row."""
    run = SplitRun(strategy={**RECIPES[name].strategy, "split": split}, trainer={"accumulate_grad_batches": 2})
    reference = wanted(name, 1)
    for result, _ in pool.run(fit, name, run, 1, world_size=2):
        assert compare(result, reference).largest <= BOUND, compare(result, reference)


def evaluated(rank: int, name: str, run: SplitRun) -> frozenset[str] | None:
    """The tensors whose targets weight an evaluation in inference mode, which Lightning leaves to GPUs."""

    class Evaluated(type(RECIPES[name].make())):  # type: ignore[misc]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

    module, trainer = RECIPES[name].make(), split_trainer(run)
    module.__class__ = Evaluated
    step = UlyssesDeepSpeedStrategy.validation_step
    with mock.patch.object(UlyssesDeepSpeedStrategy, "validation_step", torch.inference_mode()(step)):
        trainer.validate(module, split_loader(batches(name, None), run, rank))
    assert isinstance(trainer.strategy, UlyssesDeepSpeedStrategy)
    return trainer.strategy.weights._evaluated


def test_an_evaluation_in_inference_mode_is_weighted(pool: ProcessPool) -> None:
    """Rows of numbers, which an inference tensor would not let a gradient through."""
    run = SplitRun(strategy={**RECIPES["weighted"].strategy, "split": "blocks"})
    assert pool.run(evaluated, "weighted", run, world_size=2) == [frozenset({"weight>0"})] * 2


WHOLE = ("dpo", "spans", "padded_classes", "shifted", "kto", "nanogpt", "reward", "vision", "contrastive", "weighted")


@pytest.mark.parametrize("name", sampled(WHOLE, 2))
def test_two_groups_of_one_process(pool: ProcessPool, name: str) -> None:
    """Nothing is cut. How losses of groups add up is found on rows: as targets do, or all alike."""
    run, reference = SplitRun(2, 1, RECIPES[name].strategy), wanted(name)
    for result, _ in pool.run(fit, name, run, world_size=2):
        assert compare(result, reference).largest <= BOUND, compare(result, reference)


def with_rows(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "source": torch.arange(len(batch["input_ids"]))}


class Sourced(LlamaModule):
    """Gets the numbers of rows as well, which the model does not take."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return super().training_step({key: value for key, value in batch.items() if key != "source"}, batch_idx)


CHANCES = {
    "no target in one group": [token_batch(1, 12, 3, "uneven"), token_batch(2, 12, 3, "none")],
    "as many rows as tokens": [token_batch(1, 12, 3), token_batch(2, 6, 6)],
    "as many later": [token_batch(seed, *shape) for seed, shape in enumerate([(12, 3), (13, 3), (6, 6), (7, 7)])],
}


@pytest.mark.parametrize("case", CHANCES)
def test_groups_of_one_process_with_other_batches(pool: ProcessPool, case: str) -> None:
    found = CHANCES[case]
    reference = fit_single(LlamaModule, [found[i : i + 2] for i in range(0, len(found), 2)], count_targets, dp_size=2)
    for result in fit_split(pool, Sourced, [with_rows(batch) for batch in found], SplitRun(2, 1)):
        assert compare(result, reference).largest <= BOUND, compare(result, reference)


def test_a_group_whose_first_batch_has_no_target(pool: ProcessPool) -> None:
    """Its step cannot be tried; all groups go on alike, also where only one of them could take more of its batch."""
    found = CHANCES["no target in one group"]
    reference = fit_single(LlamaModule, [found], count_targets, dp_size=2)
    for result in fit_split(pool, LlamaModule, found, SplitRun(4, 2)):
        assert compare(result, reference).largest <= BOUND, compare(result, reference)


class Clamped(HandWritten):
    """Its loss is 0 for a batch without a target, where a mean is not a number."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        each = F.cross_entropy(self(x).transpose(1, 2), y, reduction="none")
        return each.sum() / (y != -100).sum().clamp_min(1)


FIRST = {"mean": HandWritten, "split inside": partial(HandWritten, positions="own"), "zero": Clamped}


# Batches without a target, and micro-batches of a step.
FEW = mostly(product((1, 2), (1, 2)), [(1, 2), (2, 1)])


@pytest.mark.parametrize("case", mostly(FIRST, ["mean"]))
@pytest.mark.parametrize(("empty", "accumulate"), FEW)
def test_first_batches_without_a_target(pool: ProcessPool, case: str, accumulate: int, empty: int) -> None:
    """Another group's batch, or the next one, says where the step is split and what its loss is a mean over."""
    make: Any = FIRST[case]
    pairs = [pair_batch(seed, 33, 2, "none" if seed < empty else "uneven") for seed in range(4)]
    steps = [pairs] if accumulate == 2 else [pairs[:2], pairs[2:]]
    reference = fit_single(make, steps, count_targets)
    run = SplitRun(4, 2, trainer={"accumulate_grad_batches": accumulate})
    for result in fit_split(pool, make, pairs, run):
        assert compare(result, reference).largest <= BOUND, compare(result, reference)


GROUPS = [("padded", 1), ("shifted", 3), ("dpo", 3), ("nanogpt", 1), ("weighted", 3), ("vision", 3)]


@pytest.mark.parametrize(("name", "stage"), mostly(GROUPS, GROUPS[1:2] + GROUPS[3:]))
def test_two_groups(pool: ProcessPool, name: str, stage: int) -> None:
    run = SplitRun(4, 2, {**RECIPES[name].strategy, "stage": stage})
    reference = wanted(name)
    for result, _ in pool.run(fit, name, run, world_size=4):
        assert compare(result, reference).largest <= BOUND, compare(result, reference)


class LargestLogits(Callback):
    """Tokens of the largest scores (..., V) that the second batch keeps for its backward."""

    tokens = 0

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.watch = ExitStack()
        if batch_idx:
            self.watch.enter_context(torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor))

    def keep(self, tensor: Tensor) -> Tensor:
        if tensor.shape[-1:] == (VOCAB,) and tensor.is_floating_point():
            self.tokens = max(self.tokens, tensor.numel() // VOCAB)
        return tensor

    def on_train_batch_end(self, *args: Any) -> None:
        self.watch.close()


def largest_logits(rank: int, name: str, run: SplitRun) -> int:
    recipe, count = RECIPES[name], LargestLogits()
    trainer = split_trainer(run, [count])
    trainer.fit(recipe.make(), split_loader([recipe.batch(seed) for seed in (1, 2)], run, rank))
    return count.tokens


@pytest.mark.parametrize(("name", "size"), [("dpo", 2), ("shifted", 4)])
def test_logits_stay_divided(pool: ProcessPool, name: str, size: int) -> None:
    """What a step keeps of its logits shrinks with P, also where its loss needs the whole sequence."""
    B, S = next(iter(RECIPES[name].batch(2).values())).shape
    # The control: one process keeps them all, except those of the last token, which has no label.
    assert pool.run(largest_logits, name, SplitRun(1, 1), world_size=1)[0] >= B * (S - 1)
    for rank, tokens in enumerate(pool.run(largest_logits, name, SplitRun(size, size), world_size=size)):
        assert 0 < tokens <= B * even_shares(S, size)[rank]
