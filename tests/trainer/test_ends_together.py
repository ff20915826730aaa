"""All ranks end a run together: at a signal, and with the shortest data."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from exact import BOUND
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from models import HandWritten, count_targets, hand_written, pair_batch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_ulysses import UlyssesError
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


class Signalled(HandWritten):
    """Gets a signal in the middle of its second step of a kind, on one rank."""

    def __init__(self, victim: int, signum: int, step: str) -> None:
        super().__init__()
        self.victim, self.signum, self.step = victim, signum, step
        self.validated = 0

    def _raise_signal(self, step: str, batch_idx: int) -> None:
        if (self.global_rank, step, batch_idx) == (self.victim, self.step, 1):
            os.kill(os.getpid(), self.signum)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self._raise_signal("training_step", batch_idx)
        return super().training_step(batch, batch_idx)

    def on_validation_batch_end(self, *args: Any) -> None:
        self.validated += 1

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        self._raise_signal("validation_step", batch_idx)
        return super().validation_step(batch, batch_idx)


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "1",
    "SLURM_NODELIST": "127.0.0.1",
    "SLURM_NODEID": "0",
}


def signalled(rank: int, folder: str, victim: int, signum: int, step: str, on_slurm: bool) -> dict[str, Any]:
    before = signal.getsignal(signum)
    run = SplitRun(trainer={"default_root_dir": folder, "enable_checkpointing": True})
    keep = OnExceptionCheckpoint(folder)
    variables = {**SLURM, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} if on_slurm else {}
    asked, ended = "lightning.pytorch.trainer.connectors.signal_connector.call", None
    with mock.patch.dict(os.environ, variables), mock.patch(asked, return_value=0) as requeue:
        trainer = split_trainer(run, [keep])
        module = Signalled(victim, signum, step)
        batches = [pair_batch(seed, 33) for seed in range(4)]
        try:
            trainer.fit(module, *(split_loader(batches, run, rank) for _ in range(2)))
        except SystemExit as end:
            ended = type(end).__name__
    connector: Any = trainer._signal_connector
    return {
        "ended": ended,
        "steps": trainer.global_step,
        "validated": module.validated,
        "saved": sorted(path.name for path in Path(folder).glob("*.ckpt")),
        "requeued": requeue.call_args_list == [mock.call(["scontrol", "requeue", "7"])],
        "restored": signal.getsignal(signum) is before and "_sigterm_notifier_fn" not in vars(connector),
    }


@pytest.mark.parametrize(
    ("victim", "step", "steps", "validated"),
    [(0, "training_step", 2, 0), (1, "training_step", 2, 0), (1, "validation_step", 4, 2)],
)
def test_sigterm_ends_all_ranks_between_the_same_batches(
    pool: ProcessPool, tmp_path: Path, victim: int, step: str, steps: int, validated: int
) -> None:
    """Whoever gets it, in the middle of a step; a checkpoint that is saved then is complete."""
    found = pool.run(signalled, str(tmp_path), victim, int(signal.SIGTERM), step, False, world_size=2)
    for each in found:
        assert (each["ended"], each["steps"], each["validated"]) == ("SIGTERMException", steps, validated)
        assert each["saved"] == ["on_exception.ckpt"] and each["restored"]


def test_a_job_is_requeued_between_two_batches(pool: ProcessPool, tmp_path: Path) -> None:
    """All ranks save, whichever got the signal; then training goes on until SLURM ends the job."""
    found = pool.run(signalled, str(tmp_path), 1, int(signal.SIGUSR1), "training_step", True, world_size=2)
    assert [(each["ended"], each["steps"], each["requeued"]) for each in found] == [(None, 4, True), (None, 4, False)]
    assert all(each["saved"] == ["hpc_ckpt_1.ckpt"] and each["restored"] for each in found)


class Stream(IterableDataset[Any]):
    """Batches without a length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def uneven(rank: int, batches: list[list[Any]], sp_size: int, has_length: bool) -> tuple[StepResult | str, list[str]]:
    run, recorder = SplitRun(2, sp_size, {}, {"accumulate_grad_batches": 2}), StepRecorder()
    data: Any = batches[rank] if has_length else Stream(batches[rank])
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            split_trainer(run, [recorder]).fit(hand_written()(), DataLoader(data, batch_size=None))
        except UlyssesError as refusal:
            return str(refusal), []
    return recorder.result(), [str(each.message) for each in heard if "fewest batches" in str(each.message)]


@pytest.mark.parametrize("has_length", [True, False])
def test_groups_with_different_numbers_of_batches(pool: ProcessPool, has_length: bool) -> None:
    """An epoch ends with the shortest, its incomplete accumulation window included, and one sentence says so."""
    batches = [[pair_batch(10 * rank + seed, 33, 1, "uneven") for seed in range(3 + rank)] for rank in range(2)]
    wanted = fit_single(
        hand_written(),
        [[batches[0][0], batches[1][0], batches[0][1], batches[1][1]], [batches[0][2], batches[1][2]]],
        count_targets,
    )
    results = pool.run(uneven, batches, 1, has_length, world_size=2)
    for result, _ in results:
        assert isinstance(result, StepResult) and compare(result, wanted).largest <= BOUND
    assert [len(said) for _, said in results] == [1, 0]


@pytest.mark.parametrize("has_length", [True, False])
def test_a_group_whose_ranks_have_different_numbers_of_batches(pool: ProcessPool, has_length: bool) -> None:
    batches = [[pair_batch(seed, 33) for seed in range(3 + rank)] for rank in range(2)]
    for refusal, _ in pool.run(uneven, batches, 2, has_length, world_size=2):
        assert isinstance(refusal, str) and "on the ranks of one sequence-parallel group" in refusal
        assert ("[3, 4] training batches" if has_length else "[1, 2] batches left") in refusal


def evaluated(rank: int, sp_size: int, stage: int) -> str:
    run = SplitRun(2, sp_size, {"stage": stage})
    try:
        split_trainer(run).validate(
            hand_written()(),
            DataLoader([pair_batch(seed, 33) for seed in range(2 + rank)], batch_size=None),
            verbose=False,
        )
    except UlyssesError as refusal:
        return str(refusal)
    return "done"


@pytest.mark.parametrize(
    ("sp_size", "stage", "found"), [(1, 2, "done"), (1, 3, "with ZeRO stage 3"), (2, 2, "of one sequence-parallel")]
)
def test_evaluation_with_different_numbers_of_batches(pool: ProcessPool, sp_size: int, stage: int, found: str) -> None:
    """Groups may have them as long as no step needs ranks of another one."""
    assert all(found in each for each in pool.run(evaluated, sp_size, stage, world_size=2))


class NotFinite(HandWritten):
    """Has a loss that is no number in its second and third step, on rank 1."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_rank == 1 and batch_idx in (1, 2) else loss


def not_finite(rank: int, stage: int) -> tuple[list[str], int]:
    run = SplitRun(strategy={"stage": stage})
    trainer: Any = split_trainer(run)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        trainer.fit(NotFinite(), split_loader([pair_batch(seed, 33) for seed in range(4)], run, rank))
    said = [str(each.message) for each in heard if "was skipped" in str(each.message)]
    return said, trainer.strategy.deepspeed_engine.skipped_steps


@pytest.mark.parametrize("stage", [2, 3])
def test_a_skipped_step_is_named_once(pool: ProcessPool, stage: int) -> None:
    (said, skipped), (silent, _) = pool.run(not_finite, stage, world_size=2)
    assert skipped == 2 and not silent
    assert len(said) == 1 and said[0].startswith("Optimizer step 2 was skipped: the loss on ranks [1] is")


class AsksForMesh(HandWritten):
    def __init__(self) -> None:
        super().__init__()
        self.meshes: list[Any] = []

    def setup(self, stage: str) -> None:
        self.meshes.append(self.device_mesh)

    def configure_model(self) -> None:
        self.meshes.append(self.device_mesh)


def mesh_of_hooks(rank: int) -> list[tuple[int, ...]]:
    module, run = AsksForMesh(), SplitRun()
    split_trainer(run).fit(module, split_loader([pair_batch(0, 33)], run, rank))
    return [tuple(mesh.shape) if mesh is not None else () for mesh in module.meshes]


def test_the_device_mesh_is_there_in_the_first_hooks(pool: ProcessPool) -> None:
    assert pool.run(mesh_of_hooks, world_size=2) == [[(1, 2), (1, 2)]] * 2
