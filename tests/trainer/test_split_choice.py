"""Where the sequence is split is decided for each kind of step, and by settings."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact import BOUND
from models import VOCAB, HandWritten, LlamaModule, count_targets, pair_batch, token_batch
from nightly import mostly
from torch import Tensor

from lightning_ulysses import UlyssesDeepSpeedStrategy, UlyssesError
from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool
from lightning_ulysses.testing.runs import StepRecorder

BATCH = token_batch(3, 33, 4, "uneven")


def prefers(model: Any, batch: Any) -> Tensor:
    y = batch["labels"][:, 1:]
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    total = (logits.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0] * (y != -100)).sum(1)
    return -F.logsigmoid(0.1 * (total[:2] - total[2:])).mean()


class Mixed(LlamaModule):
    """Trains on a token mean and validates a preference, which it only logs."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", prefers(self.model, batch))


class Preferring(Mixed):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return prefers(self.model, batch)


def fit(rank: int, make: Any, sanity: int) -> tuple[float, str, str]:
    """The validation loss before training, and where both steps are split."""
    run = SplitRun(trainer={"num_sanity_val_steps": sanity, "limit_train_batches": 1})
    trainer, module = split_trainer(run), make()
    if sanity:
        trainer.fit(module, split_loader([BATCH], run, rank), split_loader([BATCH], run, rank))
    else:
        trainer.validate(module, split_loader([BATCH], run, rank), verbose=False)
    assert isinstance(trainer.strategy, UlyssesDeepSpeedStrategy)
    core = trainer.strategy.core
    return float(trainer.callback_metrics["val_loss"]), core.split_of("train"), core.split_of("validate")


@pytest.mark.parametrize("make", [Mixed, Preferring])
def test_kinds_of_steps_are_split_apart(pool: ProcessPool, make: Any) -> None:
    for _, train, validate in pool.run(fit, make, 1, world_size=2):
        assert train == ("batch" if make is Mixed else "blocks") and validate == "blocks"


def test_what_validation_logs_is_that_of_one_process(pool: ProcessPool) -> None:
    with torch.no_grad():
        wanted = float(prefers(Mixed().eval().model, BATCH))
    for found, _, _ in pool.run(fit, Mixed, 0, world_size=2):
        assert abs(found - wanted) <= 1e-5 * wanted


class Numbered(HandWritten):
    """Counts its positions from 0, and predicts."""

    def __init__(self) -> None:
        super().__init__(positions="own")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])


class Pooling(HandWritten):
    """Predicts one vector for each row."""

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).mean(dim=1)


def predict(rank: int, make: Any) -> Any:
    run = SplitRun()
    return split_trainer(run).predict(make(), split_loader([pair_batch(1, 33, 2)], run, rank))


@pytest.mark.parametrize("make", [Numbered, Pooling])
def test_predictions_are_those_of_one_process(pool: ProcessPool, make: Any) -> None:
    with torch.no_grad():
        wanted = make().predict_step(pair_batch(1, 33, 2), 0)
    for (found,) in pool.run(predict, make, world_size=2):
        assert torch.allclose(found, wanted, atol=1e-5)


CHOSEN = [{"split": "blocks"}, {"plan": "auto"}, {"split": "blocks", "check_model": False}]


@pytest.mark.parametrize("settings", mostly(CHOSEN, CHOSEN[1:2]))
def test_blocks_by_choice(pool: ProcessPool, settings: dict[str, Any]) -> None:
    batches = [token_batch(seed, 33, 2, "uneven") for seed in range(2)]
    wanted = fit_single(LlamaModule, [batches], count_targets)
    for run in (SplitRun(4, 2, settings), SplitRun(strategy=settings, trainer={"accumulate_grad_batches": 2})):
        for result in fit_split(pool, LlamaModule, batches, run):
            assert compare(result, wanted).largest <= BOUND


class Unshifted(HandWritten):
    """Positions of its own, and every label counts: rows do not tell labels from shifted ones."""

    def __init__(self) -> None:
        super().__init__(positions="own")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


class RowMean(Unshifted):
    """KTO's form: a function of each row, and a mean over rows."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        # (B, S, V) -> (B, S) -> (B,)
        each = F.cross_entropy(self(batch["input_ids"]).transpose(1, 2), batch["input_ids"], reduction="none")
        return torch.sigmoid(each.mean(1) - 3).mean()


def fit_lengths(rank: int, settings: dict[str, Any], make: Any = Unshifted, labels: str = "even") -> Any:
    batches = [token_batch(seed, seq_len, 2, labels) for seed, seq_len in ((1, 33), (2, 17))]
    run = SplitRun(strategy=settings, trainer={"accumulate_grad_batches": 2})
    recorder = StepRecorder()
    try:
        split_trainer(run, [recorder]).fit(make(), split_loader(batches, run, rank))
    except UlyssesError as error:
        return str(error)
    return recorder.result()


def test_tensors_that_fit_alike_are_told_apart(pool: ProcessPool) -> None:
    """Rows of equal lengths weigh alike by labels, shifted labels and tokens; those of two lengths do not."""
    batches = [token_batch(seed, seq_len, 2) for seed, seq_len in ((1, 33), (2, 17))]
    for settings, count in (
        ({}, lambda b: b["labels"].numel()),
        ({"targets": "labels"}, lambda b: b["labels"].numel()),
        ({"loss_weighting": "none"}, lambda b: 1),
    ):
        wanted = fit_single(Unshifted, [batches], count)
        for result in pool.run(fit_lengths, settings, world_size=2):
            assert compare(result, wanted).largest <= BOUND, compare(result, wanted)


def test_a_mean_over_rows_is_averaged_over_batches_of_any_length(pool: ProcessPool) -> None:
    batches = [token_batch(seed, seq_len, 2, "uneven") for seed, seq_len in ((1, 33), (2, 17))]
    wanted = fit_single(RowMean, [batches], lambda batch: 1)
    for result in pool.run(fit_lengths, {}, RowMean, "uneven", world_size=2):
        assert compare(result, wanted).largest <= BOUND, compare(result, wanted)


class NoBlocks(HandWritten):
    """Attention of the module's own, whose step counts positions."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        h = self.embed(x) + self.place(torch.arange(x.shape[1]))
        h = F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None], is_causal=True)[:, 0]
        return F.cross_entropy(self.head(h).flatten(0, 1), y.flatten())


def refused(rank: int, settings: dict[str, Any]) -> str:
    run = SplitRun(strategy=settings)
    with pytest.raises(UlyssesError) as caught:
        split_trainer(run).fit(NoBlocks(), split_loader([pair_batch(1, 33, 2)], run, rank))
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "part"), [({"split": "blocks"}, "no module that attends"), ({}, "the queries of attention call 0")]
)
def test_what_has_no_blocks_is_refused(pool: ProcessPool, settings: dict[str, Any], part: str) -> None:
    for text in pool.run(refused, settings, world_size=2):
        assert part in text


@pytest.mark.parametrize(
    ("settings", "part"),
    [({"split": "block"}, "split='block'"), ({"split": "blocks", "plan": "litgpt"}, "split='blocks' and a plan")],
)
def test_settings_are_checked(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(UlyssesError, match=part):
        UlyssesDeepSpeedStrategy(**settings)


class WholeMask(torch.nn.Module):
    """``nn.TransformerEncoder`` with masks as people make them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
        self.encoder, self.kind = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), kind

    def forward(self, h: Tensor, padded: Tensor) -> Tensor:
        S = h.shape[1]
        banded = (torch.arange(S)[:, None] - torch.arange(S)).abs() > 5
        causal = torch.nn.Transformer.generate_square_subsequent_mask(S)
        masks: dict[str, tuple[Any, Any]] = {
            "padding": (None, padded),
            "float padding": (None, torch.zeros(padded.shape).masked_fill(padded, float("-inf"))),
            "causal": (causal, None),
            "causal and padding": (causal, torch.zeros(padded.shape).masked_fill(padded, float("-inf"))),
            "banded": (banded, None),
            "banded and padding": (banded, padded),
            "for each head": (banded.expand(h.shape[0] * 4, -1, -1), None),
        }
        mask, keys = masks[self.kind]
        return self.encoder(h, mask=mask, src_key_padding_mask=keys)


class Encoding(HandWritten):
    def __init__(self, kind: str) -> None:
        super().__init__(lr=0.1)
        self.inner = WholeMask(kind)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch["input_ids"], batch["labels"]
        h = self.inner(self.embed(x), batch["padded"])
        return F.cross_entropy(self.head(h).flatten(0, 1), y.flatten())


KINDS = ("padding", "float padding", "causal", "causal and padding", "banded", "banded and padding", "for each head")


SPLITS = [*((kind, "auto") for kind in KINDS), ("causal and padding", "blocks"), ("for each head", "blocks")]


@pytest.mark.parametrize(("kind", "split"), mostly(SPLITS, SPLITS[1::2]))
def test_masks_of_multihead_attention(pool: ProcessPool, kind: str, split: str) -> None:
    """Of the whole sequence, made in the model, or a slice of the padding of the batch."""
    x, y = pair_batch(2, 33, 2, "uneven")
    padded = torch.arange(33) >= torch.tensor([33, 27])[:, None]
    batch = {"input_ids": x % (VOCAB - 1), "labels": y.masked_fill(padded, -100), "padded": padded}
    run = SplitRun(strategy={"sequence_dims": {"input_ids": 1, "labels": 1, "padded": 1}, "split": split})
    make = partial(Encoding, kind)
    wanted = fit_single(make, [[batch]], lambda batch: 1.0)
    for result in fit_split(pool, make, [batch], run):
        assert compare(result, wanted).largest <= BOUND, compare(result, wanted)


class FourD(LlamaModule):
    """Passes a mask (B, 1, S, S) of its own, in which tokens see those of their segment."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        segment = batch["segments"]
        S = segment.shape[1]
        seen = (segment[:, :, None] == segment[:, None]) & torch.ones(S, S, dtype=torch.bool).tril()
        logits = self.model(input_ids=batch["input_ids"], attention_mask=seen[:, None]).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def test_masks_of_segments_for_transformers(pool: ProcessPool) -> None:
    batch = {"input_ids": token_batch(1, 33, 2)["input_ids"], "segments": torch.arange(33).expand(2, -1) // 9}
    wanted = fit_single(FourD, [[batch]], lambda batch: 1.0)
    run = SplitRun(strategy={"sequence_dims": {"input_ids": 1, "segments": 1}})
    for result in fit_split(pool, FourD, [batch], run):
        assert compare(result, wanted).largest <= BOUND, compare(result, wanted)
