"""Losses that are no mean over their targets, and batches of which ranks hold other kinds."""

from __future__ import annotations

import re
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact import BOUND
from models import VOCAB, HandWritten, LlamaModule, count_targets, pair_batch, token_batch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ulysses import TokenCountMonitor, UlyssesError
from lightning_ulysses.testing import SplitRun, compare, fit_rank, fit_single, fit_split, split_trainer
from lightning_ulysses.testing.processes import ProcessPool

# Then the cross entropies of the first steps are all that shows what a loss is.
UNTRIED = {"check_model": False}
PAIRS = [pair_batch(1, 33, 2, "uneven")]


class Returning(HandWritten):
    """Returns one of several losses over the same targets."""

    def __init__(self, form: str) -> None:
        super().__init__(lr=0.1)
        self.form = form

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits, y = self(x).flatten(0, 1), y.flatten()
        each = partial(F.cross_entropy, logits, y, reduction="none")
        losses: dict[str, Any] = {
            "mean": lambda: F.cross_entropy(logits, y),
            "log-likelihood": lambda: F.nll_loss(logits.log_softmax(-1), y),
            "smoothed": lambda: F.cross_entropy(logits, y, label_smoothing=0.1),
            "sum over its targets": lambda: F.cross_entropy(logits, y, reduction="sum") / (y != -100).sum(),
            "masked": lambda: (each() * (y != -100)).sum() / (y != -100).sum(),
            "selected": lambda: F.cross_entropy(logits[y != -100], y[y != -100]),
            "two means": lambda: F.cross_entropy(logits, y) + 0.5 * F.cross_entropy(2 * logits, y),
            "sum": lambda: F.cross_entropy(logits, y, reduction="sum"),
            "sum over all tokens": lambda: F.cross_entropy(logits, y, reduction="sum") / len(y),
            "weighted by class": lambda: F.nll_loss(logits.log_softmax(-1), y, torch.linspace(0.1, 2, VOCAB)),
            "weighted by token": lambda: (each() * (y % 5)).sum() / (y % 5).sum(),
            "with a part over all tokens": lambda: F.cross_entropy(logits, y) + logits.logsumexp(-1).pow(2).mean(),
            "not linear": lambda: F.cross_entropy(logits, y).exp(),
        }
        loss: Tensor = losses[self.form]()
        return loss


class Items(LlamaModule):
    """Has transformers divide by a number of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch, num_items_in_batch=torch.tensor(64)).loss
        return loss


def outcome(rank: int, make: Any, batches: list[Any], strategy: dict[str, Any]) -> tuple[Any, str]:
    """The result or the refusal, and what the first rank is warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result: Any = fit_rank(rank, make, batches, SplitRun(strategy={"split": "batch", **strategy}))
        except UlyssesError as error:
            result = str(error)
    return result, " ".join(str(w.message) for w in caught if "training_step" in str(w.message))


@pytest.mark.parametrize("form", ["mean", "log-likelihood", "smoothed", "sum over its targets", "masked", "two means"])
def test_means_are_exact(pool: ProcessPool, form: str) -> None:
    make = partial(Returning, form)
    reference = fit_single(make, [PAIRS], count_targets)
    for result, warning in pool.run(outcome, make, PAIRS, {}, world_size=2):
        assert compare(result, reference).largest <= BOUND and not warning


REFUSED = {
    "sum": (partial(Returning, "sum"), PAIRS),
    "sum over all tokens": (partial(Returning, "sum over all tokens"), PAIRS),
    "num_items_in_batch": (Items, [token_batch(1, 33, 2, "uneven")]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_sums_are_refused(pool: ProcessPool, case: str) -> None:
    for error, _ in pool.run(outcome, *REFUSED[case], UNTRIED, world_size=2):
        assert re.search(r"a loss that is a sum.*reduction='mean', and leave num_items_in_batch out", error), error


@pytest.mark.parametrize("settings", [UNTRIED, {}, {"targets": "1"}])
def test_class_weights_are_refused(pool: ProcessPool, settings: dict[str, Any]) -> None:
    for error, _ in pool.run(outcome, partial(Returning, "weighted by class"), PAIRS, settings, world_size=2):
        assert "with class weights" in error or "no tensor of the batch" in error


TRIED = {
    "weighted by token": (partial(Returning, "weighted by token"), PAIRS, "no tensor of the batch"),
    "part over all": (partial(Returning, "with a part over all tokens"), PAIRS, "no mean over tokens"),
    "not linear": (partial(Returning, "not linear"), PAIRS, "no mean over tokens"),
}


@pytest.mark.parametrize("case", TRIED)
def test_the_trial_of_the_step_refuses_them_all(pool: ProcessPool, case: str) -> None:
    make, batches, part = TRIED[case]
    for settings in ({}, {"targets": "1"}):
        for error, _ in pool.run(outcome, make, batches, settings, world_size=2):
            assert isinstance(error, str) and part in error, error


SUMS = {
    "sum": (partial(Returning, "sum"), [pair_batch(seed, 33, 2, "uneven") for seed in range(2)], "1"),
    "num_items_in_batch": (Items, [token_batch(seed, 33, 2, "uneven") for seed in range(2)], "labels"),
}


@pytest.mark.parametrize("case", SUMS)
@pytest.mark.parametrize(
    "run", [SplitRun(4, 2), SplitRun(trainer={"accumulate_grad_batches": 2})], ids=["dp", "accumulated"]
)
def test_sums_are_those_of_one_process(pool: ProcessPool, case: str, run: SplitRun) -> None:
    """Added up over slices, averaged over groups and micro-batches."""
    make, batches, _ = SUMS[case]
    reference = fit_single(make, [batches], lambda batch: 1.0)
    for result in fit_split(pool, make, batches, run):
        assert compare(result, reference).largest <= BOUND, compare(result, reference)


@pytest.mark.parametrize("case", SUMS)
def test_sums_have_no_targets(pool: ProcessPool, case: str) -> None:
    make, batches, targets = SUMS[case]
    for error, _ in pool.run(outcome, make, batches[:1], {"targets": targets}, world_size=2):
        assert "no mean over targets of the batch" in error and "leave targets out" in error


def test_a_sum_over_the_number_of_tokens_is_exact(pool: ProcessPool) -> None:
    make = partial(Returning, "sum over all tokens")
    reference = fit_single(make, [PAIRS], lambda batch: 1.0)
    for result, _ in pool.run(outcome, make, PAIRS, {}, world_size=2):
        assert compare(result, reference).largest <= BOUND


@pytest.mark.parametrize("form", ["weighted by token", "with a part over all tokens", "not linear"])
def test_others_are_warned_of(pool: ProcessPool, form: str) -> None:
    make = partial(Returning, form)
    (_, warning), _ = pool.run(outcome, make, PAIRS, UNTRIED, world_size=2)
    assert "not the mean of the cross entropy" in warning and "targets='1'" in warning
    (_, warning), _ = pool.run(outcome, make, PAIRS, {**UNTRIED, "targets": "1"}, world_size=2)
    assert not warning


def masked(labels: str) -> dict[str, Tensor]:
    return {**token_batch(0, 32, 1, labels), "loss_mask": torch.ones(1, 32, dtype=torch.long)}


class OfInputs(LlamaModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        return loss


KINDS: dict[str, tuple[Any, list[Any], SplitRun]] = {
    "padded on one rank": (
        LlamaModule,
        [token_batch(0, 32), token_batch(1, 33)],
        SplitRun(2, 1, {"pad_to_multiple_of": 16}),
    ),
    "padded in one group and micro-batch": (
        LlamaModule,
        [token_batch(0, 32), token_batch(1, 33), token_batch(2, 33), token_batch(3, 32, 1, "uneven")],
        SplitRun(4, 2, {"pad_to_multiple_of": 16}, {"accumulate_grad_batches": 2}),
    ),
    "a mask on one rank": (OfInputs, [masked("uneven"), token_batch(1, 33)], SplitRun(2, 1)),
}


@pytest.mark.parametrize("case", KINDS)
def test_ranks_with_other_kinds_of_batches_do_not_wait_for_each_other(pool: ProcessPool, case: str) -> None:
    make, batches, run = KINDS[case]
    reference = fit_single(make, [batches], lambda batch: float((batch["labels"][:, 1:] != -100).sum()))
    for result in fit_split(pool, make, batches, run):
        assert compare(result, reference).largest <= BOUND


def evaluate(rank: int, make: Any, batches: list[Any], run: SplitRun) -> dict[str, float]:
    """Validates on batches that data-parallel ranks may get different numbers of."""
    trainer = split_trainer(run, [TokenCountMonitor(report=False)])
    mine = batches[rank // run.sp_size :: run.world_size // run.sp_size]
    trainer.validate(make(), DataLoader(mine, batch_size=None), verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


class Regression(HandWritten):
    def __init__(self) -> None:
        super().__init__(loss="mse")

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._loss(batch)


@pytest.mark.parametrize("make", [Regression, HandWritten])
def test_ranks_may_evaluate_different_numbers_of_batches(pool: ProcessPool, make: type[HandWritten]) -> None:
    batches = [pair_batch(seed, 33, 1, "uneven") for seed in range(5)]
    if make is Regression:
        batches = [(x, torch.randn(x.shape, generator=torch.Generator().manual_seed(3))) for x, _ in batches]
    module, counts = make(), [count_targets(batch) for batch in batches]
    with torch.no_grad():
        losses = [float(module.validation_step(batch, 0)) for batch in batches]
    wanted = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    for run in (SplitRun(2, 1), SplitRun(4, 2)):
        for found in pool.run(evaluate, make, batches, run, world_size=run.world_size):
            assert found["validate/loss"] == pytest.approx(wanted, rel=1e-5)
