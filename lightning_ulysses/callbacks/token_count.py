"""Logs the exact loss and the tokens behind it, and reports them when training ends."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_ulysses.callbacks.evaluation import EvaluationMonitor, strategy_of, weights_of
from lightning_ulysses.callbacks.token_history import GIB, TokenHistory
from lightning_ulysses.callbacks.token_ledger import LOSS, PADDING, PAIRS, PEAK, TARGETS, TOKENS, WORK, StepLedger
from lightning_ulysses.callbacks.token_report import leave
from lightning_ulysses.cost.flops import model_operations, peak_flops
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.loss.token_mean import TokenMean

if TYPE_CHECKING:
    from lightning_ulysses.loss.weights import StepWeights


# Steps that are read from the device, or added up, at once.
_READ_EVERY = 50


def _logs_follow(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether loggers write after this step or it may be the last one; a call of ``log`` takes half a millisecond."""
    settings: Any = trainer
    every, step = settings.log_every_n_steps, trainer.global_step
    if not module.automatic_optimization or trainer.is_last_batch or step == trainer.max_steps:
        return True
    return bool(every) and step % every == 0


class TokenCountMonitor(EvaluationMonitor):
    """Logs the exact, token-weighted loss of every optimizer step and evaluation, and the tokens behind it.

    What a module logs itself is the mean over one rank's slice; ``ModelCheckpoint`` and ``EarlyStopping`` should
    monitor these names instead. Losses, perplexities, tokens and memory are the same on all ranks.

    - ``train/loss``, ``train/perplexity``: the mean over all targets of the optimizer step in nats, and e to its power.
    - ``train/loss_epoch``: the mean over all targets of the epoch so far when it ends, also of a resumed one.
    - ``validate/loss``, ``validate/perplexity``, ``test/loss``, ``test/perplexity``: over all targets of the
      evaluation, from the loss the step returns; with ``/dataloader_0`` behind the name where there are several.
      Lightning does not continue an evaluation within which a checkpoint was saved, so nothing of it is carried.
    - ``tokens/global``: tokens that one optimizer step trained on, without padding.
    - ``tokens/padding_fraction``: padding over all tokens. Padding is what the strategy added, what a 2-D
      ``attention_mask`` leaves out, and what a rank's slice holds of the last of several documents of a row if that is
      one repeated token without a target, as `PackingCollator` pads.
    - ``tokens/imbalance``: the work of the busiest rank over the mean, from 1. Padding is work too.
    - ``throughput/tokens_per_sec``: tokens of all ranks without padding per second since it was last logged, evaluation
      not counted; not logged for the first step.
    - ``throughput/mfu``: the part used of what the devices could compute; 0.4 is 40 %. Forward and backward on tokens
      without padding, attention by document lengths, recomputation not counted; see `cost.flops.model_operations`.
    - ``memory/peak_gib``: of the rank with the most; allocated by torch on a GPU, resident in memory on a CPU.

    ``train/loss`` is logged after every step, the others that concern training after every ``log_every_n_steps`` and
    after the last step of an epoch or a run.

    When training ends, the first rank prints a table and writes ``token_report.csv`` (a row for each optimizer step and
    rank) and ``token_report.png`` into the log directory; ``lightning-ulysses report DIR`` draws it again. Checkpoints
    carry the steps so far, 64 bytes for each step and rank, so that a resumed run reports all of them.

    Args:
        prog_bar: Whether loss and throughput appear in the progress bar.
        peak_flops: Dense operations per second of one device in the precision of the run. By default that of bf16 where
            the GPU is known; otherwise no ``throughput/mfu`` is logged.
        report: Whether to print the table and write the files.
        report_dir: Where to write them, instead of the log directory. Without either only the table is printed.

    Raises:
        UlyssesError: If ``peak_flops`` is no positive number, or the Trainer has another strategy.
    """

    def __init__(
        self,
        prog_bar: bool = True,
        peak_flops: float | None = None,
        report: bool = True,
        report_dir: str | Path | None = None,
    ) -> None:
        peak: object = peak_flops
        is_number = isinstance(peak, (int, float)) and not isinstance(peak, bool) and 0 < peak < math.inf
        if peak is not None and not is_number:
            raise UlyssesError(
                f"peak_flops={peak_flops!r}",
                "a number, the operations per second of one device",
                "set one such as 989e12, or none",
            )
        super().__init__(prog_bar)
        self.peak_flops = peak_flops
        self.report = report
        self.report_dir = report_dir
        self._history = TokenHistory()
        self._ledger: StepLedger | None = None
        self._peak: float | None = None
        self._folder: Path | None = None
        self._steps = 0
        self._seconds = 0.0
        self._since: float | None = None
        self._is_first = True
        self._recent: tuple[Tensor | float, float] = (0.0, 0.0)
        self._epoch = -1
        self._epoch_mean = TokenMean(sync_on_compute=False)
        # Sums of steps that are not in the mean yet: a torchmetrics update for each would be a tenth of the cost.
        self._waiting: list[Tensor] = []

    @override
    def state_dict(self) -> dict[str, Any]:
        self._settle_epoch()
        return {
            "history": self._history.state_dict(),
            "epoch": self._epoch,
            "epoch_mean": self._epoch_mean.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._history = TokenHistory.from_state(state_dict["history"])
        self._epoch = state_dict["epoch"]
        self._epoch_mean.load_state_dict(state_dict["epoch_mean"])
        self._waiting = []

    def _find_folder(self, trainer: pl.Trainer) -> Path | None:
        """Where the report goes; every rank has to ask, since Lightning broadcasts the log directory."""
        settings: Any = trainer
        has_logger = bool(trainer.loggers) and not settings.fast_dev_run
        folder = self.report_dir or (trainer.log_dir if has_logger else None)
        return None if folder is None else Path(folder)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = strategy_of(trainer)
        settings = strategy.ulysses
        self._ledger = StepLedger(
            strategy.mesh,
            strategy.root_device,
            settings.rules.ignore_index,
            model_operations(pl_module),
            by_targets=settings.loss_weighting == "tokens",
        )
        self._peak = self.peak_flops or peak_flops(strategy.root_device)
        self._folder = self._find_folder(trainer) if self.report else None
        if trainer.global_step == 0:
            self._epoch = -1
        if not trainer.is_global_zero:
            self._history = TokenHistory()
        self._history.rewind(trainer.global_step)
        self._epoch_mean.to(strategy.root_device)
        self._steps, self._recent = weights_of(trainer).steps, (0.0, 0.0)
        self._seconds, self._since, self._is_first = 0.0, time.perf_counter(), True

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._epoch != trainer.current_epoch:
            self._epoch_mean.reset()
            self._waiting = []
            self._epoch = trainer.current_epoch

    def _pause(self) -> None:
        """Stops the clock of the step."""
        if self._since is not None:
            self._seconds, self._since = self._seconds + time.perf_counter() - self._since, None

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        live, weights, ledger = strategy_of(trainer).local, weights_of(trainer), self._ledger
        assert ledger is not None
        ledger.add(live, weights.target_name)
        if weights.steps == self._steps:
            return
        self._steps = weights.steps
        counts = ledger.close(weights.own_loss)
        self._pause()
        seconds = float("nan") if self._is_first else self._seconds
        self._seconds, self._since, self._is_first = 0.0, time.perf_counter(), False
        sums = counts.sum(dim=0)
        self._log_loss(pl_module, weights, sums)
        if not math.isnan(seconds):
            self._recent = (self._recent[0] + sums, self._recent[1] + seconds)
        if _logs_follow(trainer, pl_module):
            self._log_tokens(pl_module, counts, sums)
        if trainer.is_global_zero:
            self._history.add(trainer.global_step, seconds, counts)
            if self._history.waiting >= _READ_EVERY:
                self._history.flush()

    def _log_loss(self, pl_module: pl.LightningModule, weights: StepWeights, sums: Tensor) -> None:
        loss = sums[LOSS].float()
        weights.settle(loss)
        self._waiting.append(sums)
        if len(self._waiting) >= _READ_EVERY:
            self._settle_epoch()
        pl_module.log("train/loss", loss, prog_bar=self.prog_bar, batch_size=1)

    def _settle_epoch(self) -> None:
        """Brings the mean over the epoch up to date."""
        if self._waiting:
            assert self._ledger is not None
            # (steps, fields)
            sums = torch.stack(self._waiting)
            self._epoch_mean.update(sums[:, LOSS], sums[:, TARGETS] if self._ledger.by_targets else 1.0)
            self._waiting = []

    def _log_tokens(self, pl_module: pl.LightningModule, counts: Tensor, sums: Tensor) -> None:
        """Logs what is behind the loss; it stays on the device until a logger or the progress bar reads it."""
        assert self._ledger is not None
        most = counts.amax(dim=0)
        values = {
            "train/perplexity": sums[LOSS].exp(),
            "tokens/global": sums[TOKENS] - sums[PADDING],
            "tokens/padding_fraction": sums[PADDING] / sums[TOKENS],
            "tokens/imbalance": most[WORK] * len(counts) / sums[WORK],
            "memory/peak_gib": most[PEAK] / GIB,
        }
        recent, seconds = self._recent
        if isinstance(recent, Tensor):
            real = recent[TOKENS] - recent[PADDING]
            values["throughput/tokens_per_sec"] = real / seconds
            if self._peak is not None:
                operations = self._ledger.operations.of(real, recent[PAIRS])
                values["throughput/mfu"] = operations / (seconds * len(counts) * self._peak)
        self._recent = (0.0, 0.0)
        for name, value in values.items():
            shown = self.prog_bar and name == "throughput/tokens_per_sec"
            pl_module.log(name, value.float(), prog_bar=shown, batch_size=1)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._settle_epoch()
        if self._epoch_mean.update_called:
            # The same on all ranks already; Lightning would ask for sync_dist.
            pl_module.log("train/loss_epoch", self._epoch_mean.compute(), sync_dist=True)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave(trainer, final=True)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # The device or the disk may be what failed, and that must stay visible.
        with suppress(RuntimeError, OSError):
            self._leave(trainer, final=False)

    def _leave(self, trainer: pl.Trainer, final: bool) -> None:
        """Leaves the report; without a collective, since other ranks may be gone."""
        if self.report and self._ledger is not None and self._history.steps:
            leave(self._history.table(self._ledger, self._peak), self._folder, final)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pause()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = time.perf_counter()
