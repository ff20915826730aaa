"""Logs the exact loss and the tokens behind it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.loss import WeightedMean
from lightning_ulysses.strategy import UlyssesDeepSpeedStrategy

if TYPE_CHECKING:
    from lightning_ulysses.weighting import StepWeights


def _strategy(trainer: pl.Trainer) -> UlyssesDeepSpeedStrategy:
    strategy = trainer.strategy
    if not isinstance(strategy, UlyssesDeepSpeedStrategy):
        raise UlyssesError(
            f"TokenCountMonitor with {type(strategy).__name__}",
            "a Trainer with UlyssesDeepSpeedStrategy",
            "set Trainer(strategy='ulysses_deepspeed'), or drop the callback",
        )
    return strategy


def _weights(trainer: pl.Trainer) -> StepWeights:
    weights = _strategy(trainer).weights
    assert weights is not None
    return weights


def _loss_of(outputs: Any) -> Tensor | None:
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


class TokenCountMonitor(pl.Callback):
    """Logs the exact, token-weighted loss of every optimizer step and evaluation, the same on all ranks.

    What a module logs itself is the mean over one rank's slice; ``ModelCheckpoint`` and ``EarlyStopping`` should
    monitor these names instead.

    - ``train/loss``: the mean over all targets of the optimizer step.
    - ``validate/loss``, ``test/loss``: the mean over all targets of the evaluation, from the loss the step returns.
    - ``tokens/global``: tokens that one optimizer step trained on.
    - ``throughput/tokens_per_sec``: tokens of all ranks per second since the step before.

    Args:
        prog_bar: Whether loss and throughput appear in the progress bar.
    """

    def __init__(self, prog_bar: bool = True) -> None:
        self.prog_bar = prog_bar
        self._tokens = 0
        self._steps = 0
        self._since: float | None = None
        self._evaluated: dict[int, WeightedMean] = {}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        _strategy(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tokens, self._steps, self._since = 0, _weights(trainer).steps, None

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = _strategy(trainer)
        live = strategy.state.pending
        assert live is not None
        self._tokens += live.rows * (live.layout.seq_len - live.layout.num_padding) * strategy.mesh.dp_size
        weights = _weights(trainer)
        if weights.steps == self._steps:
            return
        self._steps = weights.steps
        loss = weights.global_loss()
        now = time.perf_counter()
        values = {"tokens/global": float(self._tokens)}
        if self._since is not None:
            values["throughput/tokens_per_sec"] = self._tokens / (now - self._since)
        self._tokens, self._since = 0, now
        pl_module.log("train/loss", loss, prog_bar=self.prog_bar, batch_size=1)
        for name, value in values.items():
            pl_module.log(name, value, prog_bar=self.prog_bar and name.startswith("throughput"), batch_size=1)

    def _add(self, trainer: pl.Trainer, outputs: Any, dataloader_idx: int) -> None:
        loss, live = _loss_of(outputs), _strategy(trainer).state.pending
        if loss is not None and live is not None:
            mean = self._evaluated.setdefault(dataloader_idx, WeightedMean())
            _weights(trainer).evaluate(mean, loss, live)

    def _log_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for index, mean in sorted(self._evaluated.items()):
            name = f"{stage}/loss" if len(self._evaluated) == 1 else f"{stage}/loss/dataloader_{index}"
            value = _weights(trainer).reduce_mean(mean)
            # The same on all ranks already; Lightning would ask for sync_dist at every evaluation.
            pl_module.log(name, value, prog_bar=self.prog_bar, sync_dist=True)
        self._evaluated = {}

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluated, self._since = {}, None

    @override
    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluated = {}

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._add(trainer, outputs, dataloader_idx)

    @override
    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._add(trainer, outputs, dataloader_idx)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log_evaluation(trainer, pl_module, "validate")

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log_evaluation(trainer, pl_module, "test")
