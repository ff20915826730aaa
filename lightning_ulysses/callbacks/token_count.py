"""Logs the exact loss and the token counts of every step, and reports them when training ends."""

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


# Number of steps that are copied from the device, or summed, at once.
_READ_EVERY = 50


def _logs_follow(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether loggers may write after this step; other steps are spared ``log``, half a millisecond per call."""
    settings: Any = trainer
    every, step = settings.log_every_n_steps, trainer.global_step
    if not module.automatic_optimization or trainer.is_last_batch or step == trainer.max_steps:
        return True
    return bool(every) and step % every == 0


class TokenCountMonitor(EvaluationMonitor):
    """Logs the exact, token-weighted loss of every optimizer step and evaluation, and the tokens it was computed on.

    A module by itself logs the mean over one rank's slice. So ``ModelCheckpoint`` and ``EarlyStopping`` should monitor
    the names below. Losses, perplexities, token counts and memory are the same on all ranks.

    - ``train/loss``, ``train/perplexity``: the mean over all targets of the optimizer step, in nats, and e to that
      power.
    - ``train/loss_epoch``: the mean over all targets of the epoch, logged at its end. It also covers the part before a
      resume.
    - ``validate/loss``, ``validate/perplexity``, ``test/loss``, ``test/perplexity``: over all targets of the
      evaluation, from the loss that the step returns. With several dataloaders, ``/dataloader_0`` and so on is
      appended. Checkpoints hold nothing of an unfinished evaluation, since Lightning does not continue it.
    - ``train/grad_norm``: the 2-norm of the step's gradient before clipping, which DeepSpeed has computed.
    - ``tokens/global``: tokens that one optimizer step trained on, without padding.
    - ``tokens/padding_fraction``: padding divided by all tokens. Padding is what the strategy added, and what a 2-D
      ``attention_mask`` excludes. So is the last of several documents of a row, if this rank's part of it is one
      repeated token without a target, as `PackingCollator` pads.
    - ``tokens/imbalance``: the work of the busiest rank divided by the mean; 1 is best. Padding counts as work.
    - ``throughput/tokens_per_sec``: tokens of all ranks per second, without padding, since it was last logged. Time in
      evaluation does not count. Not logged for the first step.
    - ``throughput/mfu``: model FLOPs utilization, the fraction of the devices' peak rate; 0.4 is 40 %. It counts
      forward and backward on tokens without padding, and attention by document lengths. Recomputation does not count;
      see `cost.flops.model_operations`.
    - ``memory/peak_gib``: peak memory of the rank with the most. On a GPU it is memory allocated by torch, on a CPU
      resident memory.

    ``train/loss`` is logged after every step. The other training values are logged every ``log_every_n_steps``, and
    after the last step of an epoch or a run.

    When training ends, rank 0 prints a table. It also writes ``token_report.csv`` and ``token_report.png`` into the log
    directory. The csv has one row per optimizer step and rank, and one for all ranks of each step before the last 1000.
    ``lightning-ulysses report DIR`` shows both again. Checkpoints hold the steps so far, so that a resumed run reports
    all of them: 64 bytes for each rank of the last steps, and 96 for each earlier step.

    Args:
        prog_bar: Whether the progress bar shows loss and throughput. On a GPU this costs a wait for the device in every
            micro-batch, since Lightning reads the values anew for each.
        peak_flops: Dense operations per second of one device in the precision of the run. By default that of bf16, if
            the GPU is known. Otherwise ``throughput/mfu`` is not logged.
        report: Whether to print the table and write the files.
        report_dir: Where to write them, instead of the log directory. Without either, only the table is printed.
        names: Other names for some of the values. With ``{"validate/loss": "val_loss"}``, a program that monitors
            ``val_loss`` goes on working.

    Raises:
        UlyssesError: If ``peak_flops`` is not a positive number, the Trainer has another strategy, or ``names`` renames
            what is not logged.
    """

    logged = (
        *("train/loss", "train/loss_epoch", "train/perplexity", "train/grad_norm", *EvaluationMonitor.logged),
        *("tokens/global", "tokens/padding_fraction", "tokens/imbalance"),
        *("throughput/tokens_per_sec", "throughput/mfu", "memory/peak_gib"),
    )

    def __init__(
        self,
        prog_bar: bool = False,
        peak_flops: float | None = None,
        report: bool = True,
        report_dir: str | Path | None = None,
        names: dict[str, str] | None = None,
    ) -> None:
        peak: object = peak_flops
        is_number = isinstance(peak, (int, float)) and not isinstance(peak, bool) and 0 < peak < math.inf
        if peak is not None and not is_number:
            raise UlyssesError(
                f"peak_flops={peak_flops!r}",
                "a number, the operations per second of one device",
                "set one such as 989e12, or none",
            )
        super().__init__(prog_bar, names)
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
        # Sums of steps that are not in the epoch's mean yet. One torchmetrics update per step would be a tenth of this
        # callback's cost.
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
        """The folder of the report. Every rank must call this, since Lightning broadcasts the log directory."""
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
        # Only rank 0 keeps the history, but a checkpoint gives it to every rank.
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
        """Stops the step's clock."""
        if self._since is not None:
            self._seconds, self._since = self._seconds + time.perf_counter() - self._since, None

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        live, weights, ledger = strategy_of(trainer).core.local, weights_of(trainer), self._ledger
        assert ledger is not None
        # The first step may have shown that its loss is no mean over targets.
        ledger.by_targets = weights.by_targets
        ledger.add(live, weights.target_name)
        # Still within gradient accumulation: no optimizer step was taken.
        if weights.steps == self._steps:
            return
        self._steps = weights.steps
        # (W, fields), and its sum over ranks (fields,)
        counts = ledger.close(weights.own_loss)
        self._pause()
        seconds = float("nan") if self._is_first else self._seconds
        self._seconds, self._since, self._is_first = 0.0, time.perf_counter(), False
        sums = counts.sum(dim=0)
        self._log_loss(pl_module, weights, sums)
        if not math.isnan(seconds):
            self._recent = (self._recent[0] + sums, self._recent[1] + seconds)
        if _logs_follow(trainer, pl_module):
            norm = strategy_of(trainer).deepspeed_engine.get_global_grad_norm()
            self._log_tokens(pl_module, counts, sums, norm)
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
        pl_module.log(self._name("train/loss"), loss, prog_bar=self.prog_bar, batch_size=1)

    def _settle_epoch(self) -> None:
        """Adds the waiting steps to the mean over the epoch."""
        if self._waiting:
            assert self._ledger is not None
            # (steps, fields)
            sums = torch.stack(self._waiting)
            self._epoch_mean.update(sums[:, LOSS], sums[:, TARGETS] if self._ledger.by_targets else 1.0)
            self._waiting = []

    def _log_tokens(self, pl_module: pl.LightningModule, counts: Tensor, sums: Tensor, norm: Any) -> None:
        """Logs the values beside the loss. They stay on the device until a logger reads them."""
        assert self._ledger is not None
        most = counts.amax(dim=0)
        values = {
            "train/perplexity": sums[LOSS].exp(),
            "tokens/global": sums[TOKENS] - sums[PADDING],
            "tokens/padding_fraction": sums[PADDING] / sums[TOKENS],
            "tokens/imbalance": most[WORK] * len(counts) / sums[WORK],
            "memory/peak_gib": most[PEAK] / GIB,
        }
        if norm is not None:
            values["train/grad_norm"] = torch.as_tensor(norm)
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
            pl_module.log(self._name(name), value.float(), prog_bar=shown, batch_size=1)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._settle_epoch()
        if self._epoch_mean.update_called:
            # Already the same on all ranks. Without sync_dist, Lightning would warn.
            pl_module.log(self._name("train/loss_epoch"), self._epoch_mean.compute(), sync_dist=True)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave(trainer, final=True)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # If the device or the disk has failed, the report fails too, and must not hide the first error.
        with suppress(RuntimeError, OSError):
            self._leave(trainer, final=False)

    def _leave(self, trainer: pl.Trainer, final: bool) -> None:
        """Writes the report, without a collective, since other ranks may be gone."""
        if self.report and self._ledger is not None and self._history.steps:
            leave(self._history.table(self._ledger, self._peak), self._folder, final)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pause()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = time.perf_counter()
