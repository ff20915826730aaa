"""`make gpu-bench` where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.processes
def test_it_says_that_it_needs_a_gpu() -> None:
    done = run()
    assert done.returncode == 1 and "needs a GPU" in done.stdout and not done.stderr


@pytest.mark.processes
@pytest.mark.nightly
def test_the_rehearsal_runs_every_side() -> None:
    done = run("--cpu", "--to-len", "64", "--seconds", "120")
    assert done.returncode == 0, done.stdout
    assert all(f"| tiny | {side} | 64 |" in done.stdout for side in ("lightning", "alst", "ours"))
