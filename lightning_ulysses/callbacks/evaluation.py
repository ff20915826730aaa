"""Logs the exact loss of validation and test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.loss.evaluation import EvaluationLoss, compute_all
from lightning_ulysses.strategy import UlyssesDeepSpeedStrategy

if TYPE_CHECKING:
    from lightning_ulysses.loss.weights import StepWeights


def strategy_of(trainer: pl.Trainer) -> UlyssesDeepSpeedStrategy:
    """The Trainer's strategy; raises `UlyssesError` if it is not `UlyssesDeepSpeedStrategy`."""
    strategy = trainer.strategy
    if not isinstance(strategy, UlyssesDeepSpeedStrategy):
        raise UlyssesError(
            f"TokenCountMonitor with {type(strategy).__name__}",
            "a Trainer with UlyssesDeepSpeedStrategy",
            "set Trainer(strategy='ulysses_deepspeed'), or drop the callback",
        )
    return strategy


def weights_of(trainer: pl.Trainer) -> StepWeights:
    """The loss weights of the strategy; available while a Trainer runs."""
    return strategy_of(trainer).weights


def _loss_of(outputs: Any) -> Tensor | None:
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


class EvaluationMonitor(pl.Callback):
    """Logs the loss and perplexity of validation and test; see `TokenCountMonitor`.

    Args:
        prog_bar: Whether the progress bar shows the loss.
        names: Other names for some of the values.

    Raises:
        UlyssesError: If ``names`` renames what is not logged.
    """

    #: The values that are logged, by their usual names.
    logged: tuple[str, ...] = ("validate/loss", "validate/perplexity", "test/loss", "test/perplexity")

    def __init__(self, prog_bar: bool = True, names: Mapping[str, str] | None = None) -> None:
        unknown = sorted(set(names or {}) - set(self.logged))
        if unknown:
            raise UlyssesError(
                f"names={dict(names or {})!r}",
                f"some of {', '.join(self.logged)}, each with another name",
                f"leave out {', '.join(map(repr, unknown))}",
            )
        self.prog_bar = prog_bar
        self.names = dict(names or {})
        self._evaluated: list[EvaluationLoss] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        strategy_of(trainer)

    def _name(self, name: str) -> str:
        return self.names.get(name, name)

    def _add(self, trainer: pl.Trainer, outputs: Any, dataloader_idx: int) -> None:
        loss, live = _loss_of(outputs), strategy_of(trainer).core.local
        if loss is not None:
            self._evaluated[dataloader_idx].add(loss, live)

    def _log_evaluation(self, pl_module: pl.LightningModule, stage: str) -> None:
        found = {index: loss for index, loss in enumerate(compute_all(self._evaluated)) if loss is not None}
        for index, loss in found.items():
            suffix = "" if len(found) == 1 else f"/dataloader_{index}"
            # Already the same on all ranks. Without sync_dist, Lightning would warn at every evaluation.
            pl_module.log(self._name(f"{stage}/loss") + suffix, loss, prog_bar=self.prog_bar, sync_dist=True)
            pl_module.log(self._name(f"{stage}/perplexity") + suffix, loss.exp(), sync_dist=True)
        self._evaluated = []

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluated = [weights_of(trainer).evaluation() for _ in trainer.num_val_batches]

    @override
    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluated = [weights_of(trainer).evaluation() for _ in trainer.num_test_batches]

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
        self._log_evaluation(pl_module, "validate")

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log_evaluation(pl_module, "test")
