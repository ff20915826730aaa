"""Values that are monitored must be the same on all ranks, and those that a step logs are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from exact import BOUND
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from models import HandWritten, count_targets, pair_batch
from torch import Tensor

from lightning_ulysses import UlyssesError
from lightning_ulysses.callbacks import TokenCountMonitor
from lightning_ulysses.testing import SplitRun, StepRecorder, StepResult, fit_single, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool

BATCHES = [pair_batch(seed, 33, 1, "uneven") for seed in range(2)]


class Logs(HandWritten):
    def __init__(self, plateau: str = "", sync: bool = False) -> None:
        super().__init__()
        self.plateau, self.sync = plateau, sync

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))

    def on_validation_epoch_end(self) -> None:
        self.log("rank", float(self.global_rank), sync_dist=self.sync)
        if self.global_rank == 0:
            self.log("first", 1.0)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        if not self.plateau:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": self.plateau}}


class ByHand(L.Callback):
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.callback_metrics["hand"] = torch.tensor(float(trainer.global_rank))


def run(rank: int, folder: str, make: Logs, callbacks: list[L.Callback]) -> str:
    settings = {"max_epochs": 2, "enable_checkpointing": True, "default_root_dir": folder}
    trainer = split_trainer(SplitRun(trainer=settings), callbacks)
    loaders = [split_loader(BATCHES, SplitRun(), rank) for _ in range(2)]
    try:
        trainer.fit(make, *loaders)
    except UlyssesError as error:
        return str(error)
    assert not any("_monitor_candidates" in vars(callback) for callback in trainer.callbacks)
    return ""


CASES: list[tuple[str, str, Logs, list[L.Callback]]] = [
    ("ModelCheckpoint(monitor='rank')", "0 on rank 0 and 1 on rank 1", Logs(), [ModelCheckpoint(monitor="rank")]),
    ("EarlyStopping(monitor='rank')", "0 on rank 0 and 1 on rank 1", Logs(), [EarlyStopping("rank")]),
    ("ReduceLROnPlateau(monitor='rank')", "0 on rank 0 and 1 on rank 1", Logs("rank"), []),
    ("ModelCheckpoint(monitor='first')", "missing on rank 1", Logs(), [ModelCheckpoint(monitor="first")]),
    (
        "EarlyStopping(monitor='hand')",
        "0 on rank 0 and 1 on rank 1",
        Logs(),
        [ByHand(), EarlyStopping("hand", check_on_train_epoch_end=True)],
    ),
]


@pytest.mark.parametrize(("name", "values", "make", "callbacks"), CASES, ids=[case[0] for case in CASES])
def test_values_that_differ_are_refused(
    pool: ProcessPool, tmp_path: Path, name: str, values: str, make: Logs, callbacks: list[L.Callback]
) -> None:
    for text in pool.run(run, str(tmp_path), make, callbacks, world_size=2):
        assert f"Got {name}, whose value is " in text and values in text


def test_values_that_a_step_logs_can_be_monitored(pool: ProcessPool, tmp_path: Path) -> None:
    """So can those that are synchronised, as the message advises."""
    callbacks = [
        ModelCheckpoint(monitor="val_loss"),
        ModelCheckpoint(monitor="train_loss", every_n_train_steps=1),
        EarlyStopping("rank", patience=5),
    ]
    found = pool.run(run, str(tmp_path), Logs("val_loss", sync=True), callbacks, world_size=2)
    assert found == ["", ""] and list(tmp_path.rglob("*.ckpt"))


class Plain(HandWritten):
    """Logs nothing itself."""


def named(rank: int, folder: str) -> tuple[dict[str, float], str, StepResult]:
    checkpoints = ModelCheckpoint(monitor="val_loss")
    monitor = TokenCountMonitor(report=False, prog_bar=False, names={"validate/loss": "val_loss", "train/loss": "loss"})
    settings = {"enable_checkpointing": True, "default_root_dir": folder, "max_steps": 1, "log_every_n_steps": 1}
    recorder = StepRecorder()
    trainer = split_trainer(SplitRun(trainer=settings), [monitor, checkpoints, recorder])
    trainer.fit(Plain(), *(split_loader(BATCHES[:1], SplitRun(), rank) for _ in range(2)))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return metrics, checkpoints.best_model_path, recorder.result()


def test_the_monitor_logs_the_norm_and_names_that_are_chosen(pool: ProcessPool, tmp_path: Path) -> None:
    wanted = fit_single(Plain, [BATCHES[:1]], count_targets)
    for metrics, best, _ in pool.run(named, str(tmp_path), world_size=2):
        assert abs(metrics["train/grad_norm"] / wanted.grad_norms[0] - 1) <= BOUND
        assert abs(metrics["loss"] / wanted.losses[0] - 1) <= BOUND
        assert "val_loss" in metrics and best.endswith(".ckpt")
        assert not {"validate/loss", "train/loss"} & set(metrics)


def test_only_what_is_logged_has_another_name() -> None:
    with pytest.raises(UlyssesError, match="leave out 'val_loss'"):
        TokenCountMonitor(names={"val_loss": "validate/loss"})
