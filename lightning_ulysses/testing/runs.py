"""Runs a LightningModule on several processes and on one, and compares the optimizer step.

Worker processes are started once and reused, since importing torch and deepspeed takes longer than most runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_ulysses.batch.random_streams import step_stream
from lightning_ulysses.geometry.distance import largest
from lightning_ulysses.strategy import UlyssesDeepSpeedStrategy
from lightning_ulysses.testing.processes import ProcessPool

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


@dataclass(frozen=True)
class StepResult:
    """The result of a training run.

    Attributes:
        losses: The mean over the targets of each optimizer step.
        grad_norms: The 2-norm of the gradient in each step, before clipping.
        before: Parameters at the start, float32 on the CPU, by name.
        after: Parameters at the end.
    """

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    before: dict[str, Tensor]
    after: dict[str, Tensor]

    def step(self) -> Tensor:
        """All parameter changes as one vector, float64."""
        return torch.cat([(self.after[name].double() - self.before[name].double()).flatten() for name in self.before])


@dataclass(frozen=True)
class Difference:
    """Relative differences of a run from a reference. Tests bound `largest`."""

    step: float
    loss: float
    grad_norm: float

    @property
    def largest(self) -> float:
        """The largest of the three."""
        return largest((self.step, self.loss, self.grad_norm))


@dataclass(frozen=True)
class SplitRun:
    """A run on several processes.

    Args:
        world_size: Number of processes.
        sp_size: P.
        strategy: Further arguments of `UlyssesDeepSpeedStrategy`.
        trainer: Further arguments of the Trainer.
    """

    world_size: int = 2
    sp_size: int = 2
    strategy: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)


def snapshot(module: pl.LightningModule) -> dict[str, Tensor]:
    """Whole parameters as float32 copies on the CPU. Every process must call it, since ZeRO-3 gathers them."""
    from deepspeed.runtime.zero import GatheredParameters

    parameters = dict(module.named_parameters())
    partitioned = [parameter for parameter in parameters.values() if hasattr(parameter, "ds_id")]
    with GatheredParameters(partitioned, enabled=bool(partitioned)):
        return {name: parameter.detach().float().cpu().clone() for name, parameter in parameters.items()}


class StepRecorder(pl.Callback):
    """Records the values of a `StepResult`; add it to a Trainer with the strategy."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.before: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.before = snapshot(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, UlyssesDeepSpeedStrategy)
        if strategy.weights.steps > len(self.losses):
            self.losses.append(float(strategy.weights.global_loss()))
            self.grad_norms.append(float(strategy.deepspeed_engine.get_global_grad_norm() or 0.0))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.after = snapshot(pl_module)

    def result(self) -> StepResult:
        """The recorded values."""
        return StepResult(tuple(self.losses), tuple(self.grad_norms), self.before, self.after)


def split_trainer(run: SplitRun, callbacks: Sequence[pl.Callback] = ()) -> pl.Trainer:
    """A quiet Trainer for one of the processes of ``run``, on the CPU unless ``run.trainer`` says otherwise."""
    settings = {**QUIET, "accelerator": "cpu", "use_distributed_sampler": False, "max_epochs": 1, **run.trainer}
    strategy = UlyssesDeepSpeedStrategy(**{"sp_size": run.sp_size, **run.strategy})
    return pl.Trainer(devices=run.world_size, strategy=strategy, callbacks=list(callbacks), **settings)


def split_loader(batches: Sequence[Any], run: SplitRun, rank: int) -> DataLoader[Any]:
    """The batches of this rank's data-parallel group, in order: number d, d + dp_size, d + 2 * dp_size, ..."""
    dp_size = run.world_size // run.sp_size
    return DataLoader(list(batches)[rank // run.sp_size :: dp_size], batch_size=None)  # type: ignore[arg-type]


def fit_rank(rank: int, make: Callable[[], pl.LightningModule], batches: Sequence[Any], run: SplitRun) -> StepResult:
    """The part of `fit_split` that runs on one rank."""
    recorder = StepRecorder()
    split_trainer(run, [recorder]).fit(make(), split_loader(batches, run, rank))
    return recorder.result()


def fit_split(
    pool: ProcessPool, make: Callable[[], pl.LightningModule], batches: Sequence[Any], run: SplitRun
) -> list[StepResult]:
    """Trains on the processes of ``pool``.

    Args:
        pool: At least ``run.world_size`` processes.
        make: Builds the module, with the same parameters each time. The processes must be able to import it.
        batches: Whole micro-batches, dealt to data-parallel groups in turn.
        run: Sizes and settings.

    Returns:
        The result on each rank.
    """
    return pool.run(fit_rank, make, batches, run, world_size=run.world_size)


def fit_single(
    make: Callable[[], pl.LightningModule],
    steps: Sequence[Sequence[Any]],
    count: Callable[[Any], float],
    *,
    clip: float | None = None,
    seed: int | None = None,
    dp_size: int = 1,
) -> StepResult:
    """The reference: one process, no Trainer, no strategy.

    Args:
        make: Builds the module.
        steps: For each optimizer step the whole micro-batches of all data-parallel groups.
        count: Returns the number of targets of a micro-batch; its loss is the mean over them.
        clip: Largest gradient norm.
        seed: Has steps draw what the strategy has them draw in a run with this seed. By default they go on with the
            process's own generators.
        dp_size: Data-parallel groups, to which micro-batches are dealt in turn; each draws numbers of its own.
    """
    module = make()
    module.train()
    optimizer: Any = module.configure_optimizers()
    before = {name: p.detach().float().clone() for name, p in module.named_parameters()}
    losses, norms, number = [], [], -1
    for batches in steps:
        total = sum(count(batch) for batch in batches)
        optimizer.zero_grad()
        value = 0.0
        for batch in batches:
            number += 1
            # A mean over no target would be NaN.
            if not count(batch):
                continue
            with nullcontext() if seed is None else step_stream(seed, number % dp_size, number // dp_size):
                output: Any = module.training_step(batch, 0)
            loss = (output["loss"] if isinstance(output, dict) else output) * (count(batch) / total)
            loss.backward()
            value += float(loss.detach())
        norms.append(_clipped(module, clip))
        losses.append(value)
        optimizer.step()
    after = {name: p.detach().float().clone() for name, p in module.named_parameters()}
    return StepResult(tuple(losses), tuple(norms), before, after)


def _clipped(module: pl.LightningModule, clip: float | None) -> float:
    """The 2-norm of the gradient, which is then scaled down to ``clip``; in float64, since it is the reference."""
    grads = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
    # As torch and DeepSpeed clip.
    factor = 1.0 if clip is None else clip / (norm + 1e-6)
    for grad in grads:
        grad.mul_(min(factor, 1.0))
    return norm


def compare(result: StepResult, reference: StepResult) -> Difference:
    """The differences of ``result`` from ``reference``.

    Raises:
        ValueError: If they took different numbers of steps or started from different parameters.
    """
    if len(result.losses) != len(reference.losses):
        raise ValueError(f"{len(result.losses)} optimizer steps against {len(reference.losses)} of the reference.")
    for name, value in reference.before.items():
        if not torch.allclose(value, result.before[name], atol=1e-2):
            raise ValueError(f"Runs start from different values of {name}.")

    def relative(values: Sequence[float], wanted: Sequence[float]) -> float:
        return largest(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(values, wanted, strict=True))

    wanted = reference.step()
    return Difference(
        step=float((result.step() - wanted).norm() / wanted.norm().clamp_min(1e-30)),
        loss=relative(result.losses, reference.losses),
        grad_norm=relative(result.grad_norms, reference.grad_norms),
    )
