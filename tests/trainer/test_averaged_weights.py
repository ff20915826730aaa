"""Averages of weights are saved, exported, evaluated and resumed as on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from exact import BOUND
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from models import HandWritten, pair_batch
from torch import Tensor

from lightning_ulysses import UlyssesError
from lightning_ulysses.export import load_weights
from lightning_ulysses.testing import QUIET, SplitRun, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool

BATCHES = [pair_batch(seed, 33) for seed in range(4)]


class Averaging(L.Callback):
    """A callback of the user's own, which saves what it averages."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.mean = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        for name, value in pl_module.state_dict().items():
            self.mean[name].lerp_(value, 0.5)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.mean


class Saves(L.Callback):
    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def averaging(kind: str) -> list[L.Callback]:
    ema = EMAWeightAveraging(decay=0.5)
    return [{"ema": ema, "swa": WeightAveraging(), "own": Averaging()}[kind]]


def weights(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def runs(trainer: Any, loader: Any, kind: str, path: str) -> list[dict[str, Tensor]]:
    """The weights that are evaluated from a checkpoint of the first epoch, and those that a resumed run ends with."""
    trainer([*averaging(kind), Saves(path)], 2).fit(HandWritten(), loader)
    evaluated, resumed = HandWritten(), HandWritten()
    trainer([], 1).validate(evaluated, loader, ckpt_path=path, verbose=False)
    trainer(averaging(kind), 2).fit(resumed, loader, ckpt_path=path)
    return [weights(evaluated), weights(resumed)]


def split(rank: int, kind: str, path: str, stage: int) -> list[dict[str, Tensor]]:
    run = SplitRun(strategy={"stage": stage})

    def trainer(callbacks: list[L.Callback], epochs: int) -> L.Trainer:
        return split_trainer(SplitRun(strategy=run.strategy, trainer={"max_epochs": epochs}), callbacks)

    return runs(trainer, split_loader(BATCHES, run, rank), kind, path)


def alone(kind: str, path: str) -> list[dict[str, Tensor]]:
    def trainer(callbacks: list[L.Callback], epochs: int) -> L.Trainer:
        settings = {**QUIET, "accelerator": "cpu", "devices": 1, "max_epochs": epochs}
        return L.Trainer(callbacks=callbacks, **settings)

    return runs(trainer, split_loader(BATCHES, SplitRun(1, 1), 0), kind, path)


def off(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    start = weights(HandWritten())
    change = torch.cat([(wanted[name] - start[name]).flatten() for name in start])
    return float(torch.cat([(found[name] - wanted[name]).flatten() for name in start]).norm() / change.norm())


@pytest.mark.parametrize(("kind", "stage"), [("ema", 2), ("swa", 1), ("own", 2)])
def test_averages_are_those_of_one_process(pool: ProcessPool, kind: str, stage: int, tmp_path: Path) -> None:
    path = str(tmp_path / "split.ckpt")
    evaluated, resumed = alone(kind, str(tmp_path / "alone.ckpt"))
    for found in pool.run(split, kind, path, stage, world_size=2):
        assert off(found[0], evaluated) <= BOUND < off(found[1], evaluated)
        assert off(found[1], resumed) <= BOUND
    assert off(load_weights(path), evaluated) <= BOUND


def refused(rank: int) -> str:
    run = SplitRun(strategy={"stage": 3})
    with pytest.raises(UlyssesError) as caught:
        split_trainer(run, averaging("ema")).fit(HandWritten(), split_loader(BATCHES, run, rank))
    return str(caught.value)


def test_averages_at_stage_3_are_refused(pool: ProcessPool) -> None:
    for text in pool.run(refused, world_size=2):
        assert "Got EMAWeightAveraging with ZeRO stage 3" in text
