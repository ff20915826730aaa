"""Which tensor a loss is a mean over, from the losses that a step computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import HandWritten, count_targets, pair_batch
from torch import Tensor, nn

from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.loss.evidence import LossEvidence, LossWatch, TargetEvidence
from lightning_ulysses.loss.targets import TargetResolver, install
from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool

LABELS = torch.tensor([[-100, 4, 5, 6, 7]])
SHIFTED = torch.tensor([[4, 5, 6, 7, -100]])
MASK = torch.tensor([[0, 1, 1, 0, 1]])


def live(*evidence: TargetEvidence, seen: dict[str, float] | None = None, **shards: Tensor) -> LocalBatch:
    """A slice of five tokens; masks are counted by their sum."""
    counts = {name: float(t.sum() if "mask" in name else (t != -100).sum()) for name, t in shards.items()}
    counts["tokens"] = 5.0
    seen = {**counts, **(seen or {})}
    batch = LocalBatch(SequenceLayout(10, 2), dict(shards), counts=counts, seen=seen)
    batch.notes.of(LossEvidence).found.extend(evidence)
    return batch


def mean(target: Tensor, ignore_index: int = -100) -> TargetEvidence:
    return TargetEvidence(target, ignore_index)


def by_hand(target: Tensor) -> TargetEvidence:
    return TargetEvidence(target, is_mean=False)


class Agreement:
    """Stands for the other ranks, whose scores are given."""

    def __init__(self, *others: list[int]) -> None:
        self.others, self.calls = others, 0

    def __call__(self, scores: Tensor) -> Tensor:
        self.calls += 1
        assert scores.dtype == torch.int64
        return torch.stack([scores, *(torch.tensor(other) for other in self.others)]).amin(0)


def resolve(batch: LocalBatch, resolver: TargetResolver | None = None) -> str:
    return (resolver or TargetResolver(None, Agreement())).resolve(batch, batch.counts)


CASES: dict[str, tuple[LocalBatch, str]] = {
    "by name": (live(TargetEvidence(name="shift_labels"), labels=LABELS, shift_labels=LABELS), "shift_labels"),
    "by content": (live(mean(SHIFTED.flatten()), labels=LABELS, shift_labels=SHIFTED), "shift_labels"),
    "by content of equal counts": (live(mean(LABELS.flatten()), labels=LABELS, shift_labels=SHIFTED), "labels"),
    "by count": (live(mean(torch.arange(3)), labels=LABELS, other=torch.tensor([[1, 2, 3, -100, -100]])), "other"),
    "by count, all of them valid": (live(mean(torch.arange(5)), labels=LABELS), "tokens"),
    "with another ignore_index": (live(mean(torch.tensor([4, 0, 0, 7, 8]), 0), a=MASK, b=LABELS[:, :4]), "b"),
    "as the module sees it": (live(mean(torch.tensor([0, -100])), seen={"y": 1.0}, y=torch.full((1, 2), -100)), "y"),
    "masked by hand": (live(by_hand(LABELS.flatten()), y=LABELS), "y"),
    "masked by hand, clamped": (live(by_hand(LABELS.clamp_min(0).flatten()), y=LABELS), "y"),
    "loss mask": (live(by_hand(LABELS.flatten()), labels=LABELS, loss_mask=MASK), "loss_mask"),
    "loss mask of shifted labels": (
        live(by_hand(SHIFTED), labels=LABELS, shift_labels=SHIFTED, loss_mask=MASK, shift_loss_mask=MASK[:, :4]),
        "shift_loss_mask",
    ),
    "loss mask of labels": (
        live(by_hand(LABELS), labels=LABELS, shift_labels=SHIFTED, loss_mask=MASK, shift_loss_mask=MASK[:, :4]),
        "loss_mask",
    ),
    "no evidence, one candidate": (live(y=LABELS), "y"),
    "no evidence, equal candidates": (live(a=LABELS, b=SHIFTED), "a"),
    "no evidence, no candidate": (live(), "tokens"),
    "no evidence, inputs only transformers shifts": (live(shift_input_ids=SHIFTED), "tokens"),
    "by hand, inputs only transformers shifts": (live(by_hand(torch.arange(5)), shift_input_ids=SHIFTED), "tokens"),
}


@pytest.mark.parametrize("case", CASES)
def test_names(case: str) -> None:
    batch, wanted = CASES[case]
    assert resolve(batch) == wanted


ERRORS: dict[str, tuple[LocalBatch, tuple[str, ...]]] = {
    "shifted inside the step": (
        live(mean(torch.tensor([4, 5])), shift_labels=SHIFTED, labels=LABELS),
        ("2 targets (ignore_index=-100)", "'labels': 4.0", "batch['shift_labels']", "loss_weighting='none'"),
    ),
    "two losses": (
        live(mean(SHIFTED), mean(torch.arange(2)), shift_labels=SHIFTED),
        ("4 targets", "2 targets (ignore_index=-100)", "'shift_labels': 4.0"),
    ),
    "made inside the step and masked by hand": (
        live(by_hand(torch.tensor([1, -100, -100, 3, -100])), shift_input_ids=SHIFTED),
        ("2 targets (ignore_index=-100)", "'tokens': 5.0"),
    ),
    "class weights": (
        live(TargetEvidence(SHIFTED, name="class weights"), shift_labels=SHIFTED),
        ("4 targets (ignore_index=-100) with class weights", "loss_weighting='none'"),
    ),
    "candidates of different counts": (
        live(labels=LABELS[:, 1:], shift_labels=LABELS[:, 2:]),
        ("['labels', 'shift_labels']", "'labels': 4.0", "'shift_labels': 3.0", "targets='shift_labels'"),
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_losses_that_cannot_be_explained_are_refused(case: str) -> None:
    batch, parts = ERRORS[case]
    with pytest.raises(UlyssesError) as caught:
        resolve(batch)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_padding_that_no_tensor_can_mark_is_refused() -> None:
    batch = LocalBatch(SequenceLayout(16, 2, num_padding=5))
    with pytest.raises(UlyssesError, match=r"padded by 5 tokens.*leave pad_to_multiple_of out"):
        resolve(batch)


def test_an_explicit_answer_needs_no_evidence() -> None:
    agree = Agreement()
    resolver = TargetResolver("labels", agree)
    assert resolver.settled is not None and resolve(live(mean(torch.arange(2)), labels=LABELS), resolver) == "labels"
    assert agree.calls == 0
    with pytest.raises(UlyssesError, match=r"targets='labels'.*\['tokens', 'y'\]"):
        resolve(live(y=LABELS), resolver)


def test_every_rank_has_to_agree() -> None:
    # In the order of the names: labels, other, tokens, and whether all counts are equal.
    batch = live(mean(LABELS), labels=LABELS, other=SHIFTED)
    assert resolve(batch, TargetResolver(None, Agreement())) == "labels"
    assert resolve(batch, TargetResolver(None, Agreement([0, 2, 0, 1]))) == "other"
    with pytest.raises(UlyssesError, match="on some rank"):
        resolve(batch, TargetResolver(None, Agreement([0, 0, 0, 1])))
    undecided = live(labels=LABELS, other=SHIFTED)
    assert resolve(undecided, TargetResolver(None, Agreement([1, 1, 1, 1]))) == "labels"
    with pytest.raises(UlyssesError, match="any of"):
        resolve(undecided, TargetResolver(None, Agreement([1, 1, 1, 0])))


def test_certain_evidence_settles_at_once() -> None:
    agree = Agreement()
    resolver = TargetResolver(None, agree)
    assert resolver.settled is None
    assert resolve(live(mean(SHIFTED), labels=LABELS, shift_labels=SHIFTED), resolver) == "shift_labels"
    assert resolver.settled is not None
    assert resolve(live(mean(torch.arange(1)), labels=LABELS, shift_labels=SHIFTED), resolver) == "shift_labels"
    assert agree.calls == 1
    # By now no rank asks the others any more.
    with pytest.raises(UlyssesError, match=r"a batch without 'shift_labels'.*\['tokens', 'y'\].*collate function"):
        resolve(live(y=LABELS), resolver)


def test_weak_evidence_settles_after_some_batches() -> None:
    agree = Agreement()
    resolver = TargetResolver(None, agree)
    for attempt in range(3):
        assert resolver.settled is None
        assert resolve(live(mean(torch.arange(4)), y=LABELS), resolver) == "y"
        assert agree.calls == attempt + 1
    assert resolver.settled is not None


def test_a_tie_never_settles() -> None:
    resolver = TargetResolver(None, Agreement())
    for _ in range(5):
        assert resolve(live(a=LABELS, b=SHIFTED), resolver) == "a"
    assert resolver.settled is None


@contextmanager
def stepping(collect: bool = True) -> Iterator[LocalBatch]:
    context, batch = SequenceContext(SequenceMesh(0, 2, 2, 0, 1, 0)), live()
    context.notes.of(LossWatch).is_open = collect
    original = F.cross_entropy
    handle = install(context)
    try:
        with context.step(batch):
            yield batch
        F.cross_entropy(torch.zeros(2, 3), torch.zeros(2).long())
    finally:
        handle.remove()
    assert F.cross_entropy is original


def test_cross_entropies_of_a_step_are_noted() -> None:
    logits, target = torch.randn(5, 8), torch.arange(1, 6)
    weights = torch.ones(8)
    wanted: list[tuple[int, bool, str | None]] = []
    with stepping() as batch:
        calls: list[tuple[Any, tuple[int, bool, str | None]]] = [
            (lambda: F.cross_entropy(logits, target), (-100, True, None)),
            (lambda: F.cross_entropy(logits, target, ignore_index=4, reduction="none"), (4, False, None)),
            (lambda: F.cross_entropy(logits, target, None, None, 5, None, "sum"), (5, False, None)),
            (lambda: nn.CrossEntropyLoss(ignore_index=6)(logits, target), (6, True, None)),
            (lambda: F.cross_entropy(logits, target, weights), (-100, True, "class weights")),
            (lambda: F.cross_entropy(logits, target, weight=weights, reduction="none"), (-100, False, None)),
        ]
        for call, expected in calls:
            assert call().requires_grad == logits.requires_grad
            wanted.append(expected)
        F.cross_entropy(logits, logits.softmax(1))
    # Neither probabilities as targets nor a call outside of the step leave anything.
    found = batch.notes.of(LossEvidence).found
    assert [(e.ignore_index, e.is_mean, e.name) for e in found] == wanted
    assert all(e.target is not None and torch.equal(e.target, target) for e in found)


def test_nothing_is_noted_once_settled() -> None:
    with stepping(collect=False) as batch:
        F.cross_entropy(torch.zeros(2, 3), torch.zeros(2).long())
    assert not batch.notes.of(LossEvidence).found


class Clamped(HandWritten):
    """Masks its targets by hand, behind a cross entropy over all tokens."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        each = F.cross_entropy(self(x).flatten(0, 1), y.clamp_min(0).flatten(), reduction="none")
        mask = (y != -100).flatten()
        return (each * mask).sum() / mask.sum()


class Regression(HandWritten):
    """Has a tensor of inputs and one of targets that the package knows nothing about."""

    def __init__(self) -> None:
        super().__init__(loss="mse", lr=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch["input_ids"]).squeeze(-1), batch["y"])


def test_masked_by_hand_is_exact(pool: ProcessPool) -> None:
    batch = pair_batch(1, 33, 2, "uneven")
    reference = fit_single(Clamped, [[batch]], count_targets)
    assert compare(fit_split(pool, Clamped, [batch], SplitRun())[0], reference).largest <= 1e-5


def test_regression_beside_token_ids_is_exact(pool: ProcessPool) -> None:
    x, _ = pair_batch(1, 33, 2)
    batch = {"input_ids": x, "y": torch.randn(x.shape, generator=torch.Generator().manual_seed(0))}
    reference = fit_single(Regression, [[batch]], lambda batch: float(batch["y"].numel()))
    run = SplitRun(strategy={"sequence_dims": {"y": 1}})
    assert compare(fit_split(pool, Regression, [batch], run)[0], reference).largest <= 1e-5
