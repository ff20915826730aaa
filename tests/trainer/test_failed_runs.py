"""Runs of real processes that fail: all of them end in seconds, and the cause is shown once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Seconds for a run that fails, on a busy machine. Ranks that wait for each other would do so for half an hour.
SOON = 240.0
ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, os, sys
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from models import HandWritten, pair_batch
from torch.utils.data import DataLoader
from lightning_ulysses.checks.trial import runs
from lightning_ulysses.testing import SplitRun, split_trainer
from lightning_ulysses.upstream import failing

failing._PATIENCE = runs._PATIENCE = 3.0
settings = json.loads(sys.argv[1])


class Fails(HandWritten):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if (self.global_rank, batch_idx) == tuple(settings["fails"]):
            raise ValueError("only here")
        return loss


run = SplitRun(2, 2, settings["strategy"], {"enable_checkpointing": True})
data = DataLoader([pair_batch(seed, 33) for seed in range(3)], batch_size=None)
saves = ModelCheckpoint("kept", save_on_exception=True, save_last=True)
split_trainer(run, [OnExceptionCheckpoint("saved"), saves]).fit(Fails(), data)
"""


def run(folder: Path, settings: str) -> tuple[int, str, float]:
    """The exit status, what the terminal shows, and the seconds that it took."""
    (folder / "train.py").write_text(SCRIPT)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    # This machine's Python may itself have been started by a launcher.
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "train.py", settings],
        cwd=folder,
        env={**inherited, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=SOON,
    )
    return done.returncode, done.stderr, time.monotonic() - begin


@pytest.mark.processes
def test_a_refusal_is_shown_once_and_short(tmp_path: Path) -> None:
    status, shown, _ = run(tmp_path, '{"strategy": {"targets": "nothing"}, "fails": [9, 9]}')
    assert status and shown.count("UlyssesError: Got") == shown.count("Traceback") == 1, shown
    lines = shown[shown.index("Traceback") :].splitlines()
    assert len(lines) <= 6 and "train.py" in lines[1], shown


@pytest.mark.processes
@pytest.mark.parametrize(("rank", "batch_idx", "stage"), [(0, 1, 2), (1, 0, 3)], ids=["in a step", "in its trial"])
def test_a_failed_rank_waits_for_nobody(tmp_path: Path, rank: int, batch_idx: int, stage: int) -> None:
    """It shows its own error and says that nothing was saved; the others end with it, whatever they wait for."""
    settings = f'{{"strategy": {{"stage": {stage}}}, "fails": [{rank}, {batch_idx}]}}'
    status, shown, seconds = run(tmp_path, settings)
    assert status and seconds < SOON and not list(tmp_path.rglob("*.ckpt")), shown
    assert shown.count("ValueError: only here") == shown.count(f"[rank{rank}]: ValueError: only here") == 1, shown
    assert f"after the error on rank {rank}" in shown, shown
