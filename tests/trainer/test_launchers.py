"""Environments other than Lightning's own launcher."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from models import count_targets, llama, token_batch

from lightning_ulysses.testing import (
    SplitRun,
    StepRecorder,
    StepResult,
    compare,
    fit_single,
    split_loader,
    split_trainer,
)
from lightning_ulysses.testing.processes import ProcessPool


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


SCRIPT = """
import json, os
from models import hand_written, pair_batch
from lightning_ulysses.testing import SplitRun, StepRecorder, split_loader, split_trainer

run, rank, recorder = SplitRun(2, 2), int(os.environ["RANK"]), StepRecorder()
trainer = split_trainer(run, [recorder])
trainer.fit(hand_written()(), split_loader([pair_batch(seed, 33) for seed in range(3)], run, rank))
mesh = trainer.strategy.mesh
found = [type(trainer.strategy.cluster_environment).__name__, mesh.world_size, mesh.sp_size, mesh.sp_rank]
with open(f"{rank}.json", "w") as file:
    json.dump([found, recorder.losses], file)
"""


@pytest.mark.processes
def test_torchrun(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "train.py").write_text(SCRIPT)
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "tests" / "support"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run(
        [*command, "train.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [found for found, _ in ranks] == [["TorchElasticEnvironment", 2, 2, rank] for rank in range(2)]
    assert ranks[0][1] == ranks[1][1] and len(ranks[0][1]) == 3
