"""Which tensor a loss is a mean over: told apart by a trial, or known of a step that was not tried."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact import BOUND, refused
from models import HandWritten, LlamaModule, count_targets, pair_batch, token_batch
from nightly import mostly
from torch import Tensor

from lightning_ulysses.batch.excerpt import with_fewer_targets
from lightning_ulysses.checks.trial.narrowing import Attempt, agreed, narrow
from lightning_ulysses.context import LocalBatch
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.batch_keys import BatchRules
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.loss.targets import AmbiguousTargets, KnownTargets, TargetResolver
from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool

UNTRIED = {"check_model": False}
PAIRS = [pair_batch(1, 33, 2, "uneven")]


def live(known: str | None = None, **counts: float) -> LocalBatch:
    batch = LocalBatch(SequenceLayout(10, 2), {}, counts=counts, seen=counts)
    batch.notes.of(KnownTargets).name = known
    return batch


class Agreement:
    """Stands for the other ranks, whose flags are given."""

    def __init__(self, *others: list[int]) -> None:
        self.others, self.calls = others, 0

    def __call__(self, flags: Tensor) -> Tensor:
        self.calls += 1
        assert flags.dtype == torch.int64
        return torch.stack([flags, *(torch.tensor(other) for other in self.others)]).amin(0)


def resolve(batch: LocalBatch, *others: list[int]) -> str:
    return TargetResolver(None, Agreement(*others)).resolve(batch, batch.counts)


UNTRIED_NAMES: dict[str, tuple[LocalBatch, str]] = {
    "a model that got labels": (live("shift_labels", labels=5, shift_labels=4, tokens=5), "shift_labels"),
    "one candidate": (live(y=4, tokens=5), "y"),
    "equal candidates": (live(a=4, b=4, tokens=5), "a"),
    "labels before masks": (live(loss_mask=4, labels=4, shift_labels=4), "shift_labels"),
    "no candidate": (live(tokens=5), "tokens"),
    "inputs that only transformers shifts": (live(shift_input_ids=4, tokens=5), "tokens"),
    "masks that may mean anything": (live(**{"visible>0": 2, "tokens": 5}), "tokens"),
}


@pytest.mark.parametrize("case", UNTRIED_NAMES)
def test_names_of_untried_steps(case: str) -> None:
    batch, wanted = UNTRIED_NAMES[case]
    assert resolve(batch) == wanted


def test_candidates_of_different_counts_are_refused() -> None:
    with pytest.raises(AmbiguousTargets, match=r"\['shift_labels', 'labels'\].*set targets='shift_labels'"):
        resolve(live(labels=4, shift_labels=3, tokens=5))
    assert TargetResolver(None, Agreement(), guesses=True).resolve(live(a=4, b=3), {"a": 4, "b": 3}) == "a"


def test_all_ranks_agree() -> None:
    with pytest.raises(AmbiguousTargets):
        resolve(live(a=4, b=4), [0, 0, 0])
    with pytest.raises(AmbiguousTargets):
        resolve(live("a", a=4, b=3), [0, 0, 1])


def test_what_is_settled_needs_no_agreement() -> None:
    agree = Agreement()
    resolver = TargetResolver("labels", agree)
    assert resolver.resolve(live(labels=4, other=3), {"labels": 4, "other": 3}) == "labels" and agree.calls == 0
    resolver = TargetResolver(None, agree)
    for _ in range(2):
        resolver.resolve(live("labels", labels=4, other=3), {"labels": 4, "other": 3})
    assert agree.calls == 1


def test_padding_that_no_tensor_can_mark_is_refused() -> None:
    batch = LocalBatch(SequenceLayout(16, 2, num_padding=5))
    with pytest.raises(UlyssesError, match=r"padded by 5 tokens.*leave pad_to_multiple_of out"):
        resolve(batch)


def test_narrowing() -> None:
    outcomes = {
        "labels": Attempt(frozenset({"labels", "a"})),
        "a": Attempt(fails=True),
        "b": Attempt(None),
        "c": Attempt(frozenset()),
    }
    for names, wanted in (
        ({"labels", "a", "tokens"}, {"labels"}),
        ({"a", "tokens"}, {"tokens"}),
        ({"b", "tokens"}, {"b", "tokens"}),
        ({"c", "tokens"}, {"c", "tokens"}),
        ({"a"}, {"a"}),
        (set(), set()),
    ):
        assert narrow(frozenset(names), outcomes.__getitem__) == wanted
    assert agreed([Attempt(frozenset("ab")), Attempt(frozenset("bc")), Attempt()]) == Attempt(frozenset("b"))
    assert agreed([Attempt(), Attempt(fails=True)]) == Attempt(None, fails=True)


RULES = BatchRules({"answers": 1, "kept": 1, "each": 1})


def test_fewer_targets() -> None:
    answers = torch.arange(24).view(3, 8)
    answers[0, 3] = -100
    batch: dict[str, Any] = {"input_ids": answers.abs(), "answers": answers, "kept": (answers > 0).float()}
    fewer = with_fewer_targets(batch, RULES, "answers", 5)["answers"]
    # Two of three rows, of which the first target and two more stay among the first five tokens, and none behind them.
    assert fewer[0].tolist() == [0, -100, 2, -100, 4, -100, 6, 7]
    assert fewer[1].tolist() == [8, -100, -100, 11, 12, -100, 14, 15]
    assert fewer[2].tolist() == [16, 17, 18, 19, 20, -100, 22, 23] and answers[0, 1] == 1
    kept = with_fewer_targets(batch, RULES, "kept>0", 5)["kept"]
    assert kept[0].tolist() == [1, 0, 1, 0, 1, 0, 1, 1]
    shifted = with_fewer_targets({"labels": answers}, BatchRules(), "shift_labels", 5)
    assert list(shifted) == ["labels"] and torch.equal(shifted["labels"], fewer)
    pair = with_fewer_targets((answers.abs(), answers), BatchRules(), "1", 5)
    assert isinstance(pair, tuple) and torch.equal(pair[1], fewer)
    batch |= {"each": answers.float()}
    batch["answers"] = torch.full((3, 8), -100)
    for name in ("tokens", "each", "answers"):
        assert with_fewer_targets(batch, RULES, name, 5) is None


class ByMask(HandWritten):
    """A mean over what a mask keeps, or over the labels: those of the first batch do not tell which."""

    def __init__(self, key: str) -> None:
        super().__init__(lr=0.1)
        self.key = key

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits, y = self(batch["input_ids"]).transpose(1, 2), batch["answers"]
        each = F.cross_entropy(logits, y.clamp_min(0), reduction="none")
        kept = (y != -100 if self.key == "answers" else batch[self.key] > 0).float()
        return (each * kept).sum() / kept.sum()


def masked_batch(seed: int, dropped: float) -> dict[str, Tensor]:
    x, y = pair_batch(seed, 33, 2)
    kept = torch.rand(2, 33, generator=torch.Generator().manual_seed(seed)) >= dropped
    return {"input_ids": x, "answers": y.masked_fill(kept.flip(1).logical_not(), -100), "completion_mask": kept.long()}


RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "slices": (2, {}),
    "rows of one process": (1, {}),
    "rows of blocks": (2, {"split": "blocks"}),
    "a plan that joins": (2, {"plan": {"split": {"blocks.*": {"x": 1}}, "join": {"head": 1}}}),
    "a plan that does not": (2, {"plan": {"split": {"blocks.*": {"x": 1}}, "whole": ["input_ids"]}}),
}


ALIKE = list(product(RUNS, ["answers", "completion_mask"], ["32-true", "bf16-mixed"]))


@pytest.mark.parametrize(("run", "key", "precision"), mostly(ALIKE, [case for i, case in enumerate(ALIKE) if i % 3]))
def test_tensors_that_the_first_batch_does_not_tell_apart(
    pool: ProcessPool, run: str, key: str, precision: str
) -> None:
    dims = {"sequence_dims": {"answers": 1, "completion_mask": 1}}
    trainer = {"accumulate_grad_batches": 2, "precision": precision}
    sp_size, strategy = RUNS[run]
    batches = [masked_batch(0, 0.0), masked_batch(1, 0.5), masked_batch(2, 0.3), masked_batch(3, 0.7)]
    names = pool.run(settled, key, batches, SplitRun(2, sp_size, {**strategy, **dims}, trainer), world_size=2)
    wanted = {"answers": "answers", "completion_mask": "completion_mask>0"}[key]
    assert names == [wanted] * 2


def settled(rank: int, key: str, batches: list[Any], run: SplitRun) -> str | None:
    from lightning_ulysses.testing import split_loader, split_trainer

    trainer = split_trainer(run)
    trainer.fit(ByMask(key), split_loader(batches, run, rank))
    name: str | None = trainer.strategy.weights.settled  # type: ignore[attr-defined]
    return name


@pytest.mark.parametrize("key", ["answers", "completion_mask"])
def test_their_step(pool: ProcessPool, key: str) -> None:
    dims = {"sequence_dims": {"answers": 1, "completion_mask": 1}}
    batches = [masked_batch(0, 0.0), masked_batch(1, 0.5)]

    def count(batch: Any) -> float:
        return float((batch["answers"] != -100).sum() if key == "answers" else batch["completion_mask"].sum())

    wanted = fit_single(lambda: ByMask(key), [batches], count)
    run = SplitRun(strategy=dims, trainer={"accumulate_grad_batches": 2})
    for result in fit_split(pool, Making(key), batches, run):
        assert compare(result, wanted).largest <= BOUND
    other = "completion_mask" if key == "answers" else "answers"
    run = SplitRun(strategy={**dims, **UNTRIED, "targets": other}, trainer={"accumulate_grad_batches": 2})
    assert compare(fit_split(pool, Making(key), batches, run)[0], wanted).largest > 1e-3


class Making:
    """Makes modules of a key, also in other processes."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self) -> ByMask:
        return ByMask(self.key)


class RowMeans(HandWritten):
    """The mean over rows of their means over labels, which is one over labels only if all rows have as many."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        each = F.cross_entropy(self(x).transpose(1, 2), y, reduction="none")
        return (each.sum(1) / (y != -100).sum(1)).mean()


def test_a_tie_that_nothing_breaks_ends_where_it_matters(pool: ProcessPool) -> None:
    even = pair_batch(1, 33, 2)
    run = SplitRun(strategy={"split": "batch"})
    wanted = fit_single(RowMeans, [[even]], count_targets)
    for result in fit_split(pool, RowMeans, [even], run):
        assert compare(result, wanted).largest <= BOUND
    for text in pool.run(refused, RowMeans, [even, PAIRS[0]], run, world_size=2):
        assert "['1', 'tokens'] weight differently" in text and "set targets to one of" in text


def test_an_untried_step_asks_for_its_targets(pool: ProcessPool) -> None:
    batch = token_batch(1, 33, 2, "uneven")
    batch["other"] = batch["labels"].clamp_min(1)
    batch["shift_labels"] = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    strategy = {**UNTRIED, "sequence_dims": {"other": 1}}
    for text in pool.run(refused, ByLabels, [batch], SplitRun(strategy=strategy), world_size=2):
        assert "the step was not tried" in text and "set targets='shift_labels'" in text
    wanted = fit_single(ByLabels, [[batch]], count_targets)
    run = SplitRun(strategy={**strategy, "targets": "shift_labels"})
    for result in fit_split(pool, ByLabels, [batch], run):
        assert compare(result, wanted).largest <= BOUND


class ByLabels(HandWritten):
    """Shifted labels, by hand."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch["input_ids"]).flatten(0, 1), batch["shift_labels"].flatten())


def test_an_untried_transformers_model_is_known(pool: ProcessPool) -> None:
    batch = token_batch(1, 33, 2, "uneven")
    wanted = fit_single(LlamaModule, [[batch]], count_targets)
    for result in fit_split(pool, LlamaModule, [batch], SplitRun(strategy=UNTRIED)):
        assert compare(result, wanted).largest <= BOUND
