"""Hooks on a batch's way to the device see whole sequences, as in one process."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from exact import BOUND
from models import LlamaModule, token_batch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ulysses import UlyssesError
from lightning_ulysses.testing import (
    SplitRun,
    StepRecorder,
    StepResult,
    compare,
    fit_rank,
    fit_single,
    fit_split,
    split_loader,
    split_trainer,
)
from lightning_ulysses.testing.processes import ProcessPool


def drop_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The labels of every third token id, and of what comes before the middle of the whole row."""
    labels = batch["labels"].clone()
    labels[labels % 3 == 0] = -100
    labels[:, : labels.shape[1] // 4] = -100
    return {**batch, "labels": labels}


def mask_tokens(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tokens to be predicted are replaced; the labels exist only from here on."""
    tokens = batch["input_ids"]
    masked = (tokens * 7 + torch.arange(tokens.shape[1])) % 5 == 0
    return {"input_ids": tokens.masked_fill(masked, 3), "truth": tokens.masked_fill(~masked, -100)}


def turn_around(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """An augmentation along the sequence."""
    return {key: value.flip(1) for key, value in batch.items()}


class Hooked(LlamaModule):
    change: Any = None

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return type(self).change(batch)


class Drops(Hooked):
    change = staticmethod(drop_labels)


class Turns(Hooked):
    change = staticmethod(turn_around)


class Masks(Hooked):
    change = staticmethod(mask_tokens)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.model(input_ids=batch["input_ids"]).logits
        return F.cross_entropy(logits.flatten(0, 1), batch["truth"].flatten())


class Moves(LlamaModule):
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return drop_labels(super().transfer_batch_to_device(batch, device, dataloader_idx))


def alone(make: Any, change: Any) -> Any:
    """The same module, whose step runs the hook itself."""

    def build() -> L.LightningModule:
        module = make()
        step = module.training_step
        module.training_step = lambda batch, index: step(change(batch), index)
        return module

    return build


CASES = {
    "labels": (Drops, drop_labels, lambda b: float((drop_labels(b)["labels"][:, 1:] != -100).sum())),
    "tokens": (Turns, turn_around, lambda b: float((turn_around(b)["labels"][:, 1:] != -100).sum())),
    "masked": (Masks, mask_tokens, lambda b: float((mask_tokens(b)["truth"] != -100).sum())),
    "moved": (Moves, drop_labels, lambda b: float((drop_labels(b)["labels"][:, 1:] != -100).sum())),
}


@pytest.mark.parametrize(("case", "world_size"), [("labels", 4), ("tokens", 2), ("masked", 2), ("moved", 2)])
def test_the_step_is_that_of_one_process(pool: ProcessPool, case: str, world_size: int) -> None:
    make, change, count = CASES[case]
    sp_size = 2
    batches = [token_batch(seed, 33, 2, "uneven") for seed in range(1, 1 + 2 * world_size // sp_size)]
    strategy = {"sequence_dims": {"input_ids": 1, "truth": 1}} if case == "masked" else {}
    run = SplitRun(world_size=world_size, sp_size=sp_size, strategy=strategy)
    dp_size = world_size // sp_size
    steps = [batches[i : i + dp_size] for i in range(0, len(batches), dp_size)]
    wanted = fit_single(alone(make, change), steps, count=count, dp_size=dp_size)
    for result in fit_split(pool, make, batches, run):
        assert compare(result, wanted).largest <= BOUND


class Data(L.LightningDataModule):
    def __init__(self, loader: Any) -> None:
        super().__init__()
        self.loader = loader

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return drop_labels(batch)


def fit_data(rank: int, batches: list[Any], run: SplitRun) -> StepResult:
    recorder = StepRecorder()
    split_trainer(run, [recorder]).fit(LlamaModule(), datamodule=Data(split_loader(batches, run, rank)))
    return recorder.result()


def test_hooks_of_a_datamodule(pool: ProcessPool) -> None:
    batches, count = [token_batch(1, 33, 2)], CASES["labels"][2]
    wanted = fit_single(alone(LlamaModule, drop_labels), [batches], count=count)
    run = SplitRun(world_size=2, sp_size=2)
    for result in pool.run(fit_data, batches, run, world_size=2):
        assert compare(result, wanted).largest <= BOUND


def refused(rank: int, batches: list[Any], run: SplitRun) -> str:
    with pytest.raises(UlyssesError) as caught:
        fit_rank(rank, Drops, batches, run)
    return str(caught.value)


def test_labels_that_change_are_not_counted_ahead(pool: ProcessPool) -> None:
    """With several micro-batches, a step's targets must be known before the first of them runs."""
    run = SplitRun(world_size=2, sp_size=2, trainer={"accumulate_grad_batches": 2})
    for error in pool.run(refused, [token_batch(seed, 33, 2) for seed in (1, 2)], run, world_size=2):
        assert "when the dataloader yielded it" in error and "on_after_batch_transfer" in error
