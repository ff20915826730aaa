"""Losses that slices cannot add up to are refused by the trial of the step; means over targets are not."""

from __future__ import annotations

import ast
import copy
import re
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from exact import BOUND, refused
from models import VOCAB, HandWritten, LlamaModule, Warmer, pair_batch, token_batch
from nightly import sampled
from torch import Tensor

from lightning_ulysses import UlyssesError
from lightning_ulysses.testing import SplitRun, compare, fit_rank, fit_single, fit_split, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool


class Steps(LlamaModule):
    """A Llama whose step computes one of many losses, as user's steps do."""

    def __init__(self, name: str) -> None:
        super().__init__(lr=0.1)
        self.name = name

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return globals()[self.name](self.model, batch)


def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(input_ids=batch["input_ids"]).logits


def _logprobs(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    y = batch["shift_labels"]
    picked = _logits(model, batch).log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0]
    return picked * (y != -100), y != -100


def of_the_model(model: Any, batch: Any) -> Tensor:
    return model(**batch).loss


def by_cross_entropy(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(_logits(model, batch).flatten(0, 1), batch["shift_labels"].flatten())


def gathered(model: Any, batch: Any) -> Tensor:
    picked, kept = _logprobs(model, batch)
    return -picked.sum() / kept.sum()


def smoothed(model: Any, batch: Any) -> Tensor:
    logits, y = _logits(model, batch).flatten(0, 1), batch["shift_labels"].flatten()
    return F.cross_entropy(logits, y, label_smoothing=0.1)


def focal(model: Any, batch: Any) -> Tensor:
    picked, kept = _logprobs(model, batch)
    return -(((1 - picked.exp()) ** 2) * picked)[kept].mean()


def with_z_loss_over_targets(model: Any, batch: Any) -> Tensor:
    logits, y = _logits(model, batch), batch["shift_labels"]
    z = logits.logsumexp(-1)[y != -100].pow(2).mean()
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()) + 0.1 * z


def over_all_tokens(model: Any, batch: Any) -> Tensor:
    return _logits(model, batch).pow(2).mean()


MEANS = (of_the_model, by_cross_entropy, gathered, smoothed, focal, with_z_loss_over_targets, over_all_tokens)


def dpo(model: Any, batch: Any) -> Tensor:
    total = _logprobs(model, batch)[0].sum(1)
    return -F.logsigmoid(0.1 * (total[:2] - total[2:])).mean()


def dpo_shifted_in_the_step(model: Any, batch: Any) -> Tensor:
    logits, y = model(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
    picked = logits.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0]
    total = (picked * (y != -100)).sum(1)
    return -F.logsigmoid(0.1 * (total[:2] - total[2:])).mean()


def kto(model: Any, batch: Any) -> Tensor:
    total = _logprobs(model, batch)[0].sum(1)
    return (1 - torch.sigmoid(0.1 * total)).mean()


def orpo(model: Any, batch: Any) -> Tensor:
    picked, kept = _logprobs(model, batch)
    mean = picked.sum(1) / kept.sum(1).clamp(min=1)
    chosen, rejected = mean[:2], mean[2:]
    odds = chosen - rejected - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return (-chosen - 0.1 * F.logsigmoid(odds)).mean()


def row_means(model: Any, batch: Any) -> Tensor:
    picked, kept = _logprobs(model, batch)
    return -(picked.sum(1) / kept.sum(1).clamp(min=1)).mean()


def last_token(model: Any, batch: Any) -> Tensor:
    return _logits(model, batch)[:, -1].pow(2).mean()


def mean_pooled(model: Any, batch: Any) -> Tensor:
    return _logits(model, batch)[..., 0].mean(1).sigmoid().sum()


def with_z_loss_over_all(model: Any, batch: Any) -> Tensor:
    logits, y = _logits(model, batch), batch["shift_labels"]
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()) + 0.1 * logits.logsumexp(-1).pow(2).mean()


def two_denominators(model: Any, batch: Any) -> Tensor:
    logits, y = _logits(model, batch), batch["shift_labels"]
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()) + 0.3 * F.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten()
    )


def several_tokens_ahead(model: Any, batch: Any) -> Tensor:
    logits, x = _logits(model, batch), batch["input_ids"]
    losses = [F.cross_entropy(logits[:, :-n].flatten(0, 1), x[:, n:].flatten()) for n in (1, 2)]
    return losses[0] + 0.3 * losses[1]


def classified(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(_logits(model, batch).mean(1), torch.arange(4))


def where_a_span_begins(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(_logits(model, batch)[..., 0], torch.tensor([3, 30, 17, 31]))


def masked_in_the_step(model: Any, batch: Any) -> Tensor:
    x = batch["input_ids"]
    masked = torch.rand(x.shape) < 0.3
    return F.cross_entropy(model(input_ids=x.masked_fill(masked, 0)).logits[masked], x[masked])


PREFERENCES = (dpo, dpo_shifted_in_the_step, orpo)
NO_MEANS = (*PREFERENCES, kto, row_means, last_token, mean_pooled, with_z_loss_over_all, two_denominators)
NO_MEANS += (several_tokens_ahead,)
BATCH = token_batch(3, 33, 4, "uneven")


def outcome(rank: int, make: Any, batch: Any, strategy: dict[str, Any]) -> tuple[str, list[str]]:
    """What the run said: a refusal, or nothing, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit_rank(rank, make, [batch], SplitRun(strategy={"split": "batch", **strategy}))
        except UlyssesError as error:
            return str(error), []
        except IndexError as error:
            return " ".join(getattr(error, "__notes__", ["plan={'split'"])), []
    return "", [str(warning.message) for warning in caught if "tried" in str(warning.message)]


@pytest.mark.parametrize("loss", MEANS, ids=lambda loss: loss.__name__)
def test_means_over_targets_train(pool: ProcessPool, loss: Any) -> None:
    for text, said in pool.run(outcome, partial(Steps, loss.__name__), BATCH, {}, world_size=2):
        assert text == "" and said == []


@pytest.mark.parametrize("loss", sampled(NO_MEANS, 2), ids=lambda loss: loss.__name__)
def test_what_is_no_mean_is_refused(pool: ProcessPool, loss: Any) -> None:
    for settings in ({}, {"targets": "shift_labels"}, {"loss_weighting": "none"}):
        for text, _ in pool.run(outcome, partial(Steps, loss.__name__), BATCH, settings, world_size=2):
            assert "no mean over tokens" in text, (settings, text)


def test_even_rows_are_refused_for_the_same_reason(pool: ProcessPool) -> None:
    """Labels and shifted labels fit such a loss alike. Naming one of them would not make it a mean over either."""
    for text, _ in pool.run(
        outcome, partial(Steps, "dpo_shifted_in_the_step"), token_batch(3, 32, 4), {}, world_size=2
    ):
        assert "no mean over tokens" in text and "plan={'split'" in text


EARLIER = (classified, where_a_span_begins, masked_in_the_step)


@pytest.mark.parametrize("loss", EARLIER, ids=lambda loss: loss.__name__)
def test_what_the_step_refuses_itself_is_told_of_the_plan(pool: ProcessPool, loss: Any) -> None:
    for text, _ in pool.run(outcome, partial(Steps, loss.__name__), BATCH, {}, world_size=2):
        assert "plan={'split'" in text, text


def distilled(model: Any, batch: Any) -> Tensor:
    logits = _logits(model, batch).flatten(0, 1)
    return F.kl_div(
        logits.log_softmax(-1), torch.linspace(0, 1, VOCAB).softmax(0).expand_as(logits), reduction="batchmean"
    )


def test_several_tensors_that_fit_alike_train(pool: ProcessPool) -> None:
    """The loss is over all tokens, and two tensors have no token that is ignored."""
    batch = token_batch(3, 34, 4)
    batch["actions"] = batch["labels"].flip(1)
    run = SplitRun(strategy={"sequence_dims": {"actions": 1}})
    make = partial(Steps, "distilled")
    wanted = fit_single(make, [[batch]], lambda batch: 1.0)
    for result in pool.run(fit_rank, make, [batch], run, world_size=2):
        assert compare(result, wanted).largest <= BOUND


def train_as_advised(rank: int, make: Any, batch: Any) -> tuple[str, Any]:
    """Follows the message's advice, and trains with the plan that it gives."""
    text, _ = outcome(rank, make, batch, {})
    found = re.search(r"plan=(\{.*\}) and loss_weighting='none'", text)
    if found is None:
        return text, None
    settings: dict[str, Any] = {"plan": ast.literal_eval(found[1]), "loss_weighting": "none"}
    return text, fit_rank(rank, make, [batch], SplitRun(strategy=settings))


@pytest.mark.parametrize(
    "loss",
    sampled([*PREFERENCES, *EARLIER[:2], row_means, last_token, mean_pooled], 3),
    ids=lambda loss: loss.__name__,
)
def test_the_plan_in_the_message_is_exact(pool: ProcessPool, loss: Any) -> None:
    make = partial(Steps, loss.__name__)
    batch = {**BATCH, "shift_labels": F.pad(BATCH["labels"][:, 1:], (0, 1), value=-100)}
    wanted = fit_single(make, [[batch]], lambda batch: 1.0)
    for text, result in pool.run(train_as_advised, make, batch, world_size=2):
        assert result is not None, text
        assert compare(result, wanted).largest <= BOUND, compare(result, wanted)


@pytest.mark.parametrize("loss", sampled([*NO_MEANS, *EARLIER[:2]], 3), ids=lambda loss: loss.__name__)
def test_by_default_they_are_split_inside(pool: ProcessPool, loss: Any) -> None:
    make = partial(Steps, loss.__name__)
    batch = {**BATCH, "shift_labels": F.pad(BATCH["labels"][:, 1:], (0, 1), value=-100)}
    wanted = fit_single(make, [[batch]], lambda batch: 1.0)
    for result in fit_split(pool, make, [batch], SplitRun()):
        assert compare(result, wanted).largest <= BOUND, compare(result, wanted)


class ByHand(HandWritten):
    """Blocks in a list, a loss of rows, and more that a step may do."""

    def __init__(self, loss: str) -> None:
        super().__init__()
        self.loss_name = loss
        self.seen = torchmetrics.MeanMetric()
        self.steps: list[int] = []
        self.register_buffer("count", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.steps.append(batch_idx)
        self.count += 1
        logits = F.dropout(self(x), 0.1, self.training)
        self.seen(logits.detach().mean())
        self.log("mean", logits.mean())
        if self.loss_name == "noise before":
            hidden = self.embed(x)
            # By the length of the slice.
            hidden = hidden + torch.rand_like(hidden) / hidden.shape[1]
            for block in self.blocks:
                hidden = block(hidden)
            return F.cross_entropy(self.head(hidden).flatten(0, 1), y.flatten())
        rows = F.cross_entropy(logits.transpose(1, 2), y, reduction="none").sum(1) / (y != -100).sum(1)
        if self.loss_name == "rows":
            return rows.mean()
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


@pytest.mark.parametrize(
    ("loss", "part"), [("rows", "no mean over tokens"), ("noise before", "'blocks.0.norm1' (LayerNorm)")]
)
def test_hand_written_steps(pool: ProcessPool, loss: str, part: str) -> None:
    for text, _ in pool.run(outcome, partial(ByHand, loss), pair_batch(1, 33, 2, "uneven"), {}, world_size=2):
        assert part in text and "'blocks.*'" in text


def leaves_nothing(rank: int) -> tuple[list[int], float, float]:
    module = ByHand("mean")
    run = SplitRun()
    split_trainer(run).fit(module, split_loader([pair_batch(1, 33, 2, "uneven")], run, rank))
    return module.steps, float(module.count), float(module.seen.weight)


def test_the_trial_leaves_nothing_behind(pool: ProcessPool) -> None:
    for steps, count, weight in pool.run(leaves_nothing, world_size=2):
        assert steps == [0] and count == 1 and weight == 1


class Manual(HandWritten):
    def __init__(self, rows: bool) -> None:
        super().__init__(manual=True)
        self.rows = rows

    def _loss(self, batch: Any) -> Tensor:
        x, y = batch
        logits = self(x)
        if self.rows:
            return (F.cross_entropy(logits.transpose(1, 2), y, reduction="none").sum(1) / (y != -100).sum(1)).mean()
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


@pytest.mark.parametrize("rows", [False, True])
def test_manual_optimization_ends_at_its_backward(pool: ProcessPool, rows: bool) -> None:
    for text, said in pool.run(outcome, partial(Manual, rows), pair_batch(1, 33, 2, "uneven"), {}, world_size=2):
        assert ("no mean over tokens" in text) == rows and said == []


class InPlace(HandWritten):
    """Writes to its batch, which is not copied to a device."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x.add_(1).remainder_(VOCAB)
        return F.cross_entropy(self(x).flatten(0, 1), y.flatten())


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("seq_len", [33, 200])
def test_a_step_may_write_to_its_batch(pool: ProcessPool, rows: int, seq_len: int) -> None:
    batch = pair_batch(1, seq_len, rows)
    wanted = fit_single(InPlace, [[copy.deepcopy(batch)]], lambda batch: float(batch[1].numel()))
    for result in fit_split(pool, InPlace, [batch], SplitRun()):
        assert compare(result, wanted).largest <= BOUND


def test_a_wrong_name_is_refused(pool: ProcessPool) -> None:
    make = partial(Steps, "by_cross_entropy")
    for text, _ in pool.run(outcome, make, BATCH, {"targets": "labels"}, world_size=2):
        assert "targets='labels' for a loss that is a mean over those of ['shift_labels']" in text


def test_what_high_positions_change_is_seen_before_the_first_step(pool: ProcessPool) -> None:
    """The batch is cut between low and high positions; an excerpt of neighbours would show one of them only."""
    tokens = token_batch(1, 101)["input_ids"]
    batch = {"input_ids": tokens[:, :-1], "shift_labels": tokens[:, 1:], "position_ids": torch.arange(100)[None]}
    run = SplitRun(world_size=2, sp_size=2, strategy={"split": "batch"})
    for error in pool.run(refused, Warmer, [batch], run, world_size=2):
        assert "what 'blocks.0.norm2' (LayerNorm) returns" in error and "split='auto'" in error
    wanted = fit_single(Warmer, [[batch]], count=lambda batch: 100.0)
    for result in fit_split(pool, Warmer, [batch], SplitRun(world_size=2, sp_size=2)):
        assert compare(result, wanted).largest <= BOUND


class Supervised(LlamaModule):
    """Predicts from an inner layer as well, which it takes by its place among the hidden states."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        output = self.model(input_ids=batch["input_ids"], output_hidden_states=True)
        assert len(output.hidden_states) == len(self.model.model.layers) + 1
        inner = self.model.lm_head(output.hidden_states[1])
        targets = batch["shift_labels"].flatten()
        return sum(F.cross_entropy(logits.flatten(0, 1), targets) for logits in (output.logits, inner))


def test_hooks_of_a_first_forward_are_there_once(pool: ProcessPool) -> None:
    """transformers registers those that collect hidden states when it first collects some."""
    tokens = token_batch(1, 34, 2)["input_ids"]
    batch = {"input_ids": tokens[:, :-1], "shift_labels": tokens[:, 1:]}
    wanted = fit_single(Supervised, [[batch]], count=lambda batch: 66.0)
    for result in fit_split(pool, Supervised, [batch], SplitRun()):
        assert compare(result, wanted).largest <= BOUND
