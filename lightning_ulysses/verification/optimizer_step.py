"""Compares a step of the module's own optimizer under ZeRO with one in a single process, on the same gradients.

The gradients are those of the split run on both sides, since an optimizer such as Adam makes large differences of small
ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.verification.run import Compared, Job, finish, fit, prepare, single_inputs, whole_gradients

_OF = "-step"


@dataclass
class StepRecord:
    """What one process saw.

    Attributes:
        gradients: Whole gradients, on rank 0 only.
        before: Weights before the step.
        after: Weights after it.
        error: What ended the run: a `UlyssesError`, or a traceback.
    """

    gradients: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    error: UlyssesError | str | None = None


class _StepKeeper(pl.Callback):
    """Keeps weights before and after the first step; with ``gradients`` that step takes them in place of its own."""

    def __init__(self, record: StepRecord, gradients: dict[str, Tensor] | None) -> None:
        self.record = record
        self.gradients = gradients

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.record.before = _weights(pl_module)
        if self.gradients is None:
            self.record.gradients = whole_gradients(trainer, pl_module)
            return
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad:
                parameter.grad = self.gradients[name].to(parameter)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.record.after = _weights(pl_module)


def _weights(module: pl.LightningModule) -> dict[str, Tensor]:
    return {name: p.detach().float().cpu().clone() for name, p in module.named_parameters() if p.requires_grad}


def step_split(rank: int, job: Job) -> None:
    """One of P processes."""
    record = StepRecord()

    def run() -> None:
        strategy = Compared(sp_size=job.sizes, check_model=False, **job.strategy)
        module = prepare(job, False, [], steps=True)
        fit(job, module, strategy, job.sp_size, job.batches[:1], _StepKeeper(record, None))

    finish(record, job.path(rank, _OF), run)


def step_single(rank: int, job: Job) -> None:
    """One process, with the gradients of the others."""
    record = StepRecord()

    def run() -> None:
        split: StepRecord = torch.load(job.path(0, _OF), weights_only=False)
        batches, strategy = single_inputs(job)
        fit(job, prepare(job, False, [], steps=True), strategy, 1, batches[:1], _StepKeeper(record, split.gradients))

    finish(record, job.path(None, _OF), run)


def difference(single: StepRecord, split: StepRecord) -> float | None:
    """The relative L2 difference of the two steps beyond what rounding of the weights explains.

    Returns:
        None if the step moves nothing, as at the beginning of a warmup.
    """
    pairs = [(single.after[name] - single.before[name], split.after[name] - single.after[name]) for name in split.after]
    size, apart = (math.sqrt(sum(float(pair[side].double().square().sum()) for pair in pairs)) for side in (0, 1))
    weights = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in single.after.values()))
    return max(apart - torch.finfo(torch.float32).eps * weights, 0.0) / size if size else None
