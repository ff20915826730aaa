"""Environments other than Lightning's own launcher."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from models import count_targets, llama, token_batch

from lightning_ulysses.processes import ProcessPool
from lightning_ulysses.testing import (
    SplitRun,
    StepRecorder,
    StepResult,
    compare,
    fit_single,
    split_loader,
    split_trainer,
)


def launched(rank: int, kind: str, world_size: int) -> tuple[str, StepResult]:
    variables = {
        "torchrun": {
            "TORCHELASTIC_RUN_ID": "1",
            "LOCAL_WORLD_SIZE": str(world_size),
            "GROUP_RANK": "0",
        },
        "slurm": {
            "SLURM_JOB_ID": "1",
            "SLURM_JOB_NAME": "train",
            "SLURM_NTASKS": str(world_size),
            "SLURM_NTASKS_PER_NODE": str(world_size),
            "SLURM_NNODES": "1",
            "SLURM_NODELIST": "127.0.0.1",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NODEID": "0",
        },
    }[kind]
    run = SplitRun(world_size, 2)
    batches = [token_batch(seed, 33) for seed in range(world_size // 2)]
    with mock.patch.dict(os.environ, variables):
        recorder = StepRecorder()
        trainer = split_trainer(run, [recorder])
        trainer.fit(llama()(), split_loader(batches, run, rank))
    environment: Any = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
    return type(environment).__name__, recorder.result()


@pytest.mark.parametrize(("kind", "environment"), [("torchrun", TorchElasticEnvironment), ("slurm", SLURMEnvironment)])
def test_environment(pool: ProcessPool, kind: str, environment: type) -> None:
    batches = [token_batch(seed, 33) for seed in range(2)]
    reference = fit_single(llama(), [batches], count_targets)
    for name, result in pool.run(launched, kind, 4, world_size=4):
        assert name == environment.__name__
        assert compare(result, reference).largest <= 1e-5
