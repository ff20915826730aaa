"""What a process keeps of a fit: nothing. `benchmarks/load.py` looks at more of them."""

from __future__ import annotations

import gc
import os

from models import llama, token_batch

from lightning_ulysses.testing import SplitRun, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool


def held_after_fits(rank: int, count: int) -> list[tuple[int, int, int]]:
    from deepspeed.runtime.engine import DeepSpeedEngine

    found = []
    for number in range(count):
        run = SplitRun(2, 2, {"stage": 2 + number % 2})
        split_trainer(run).fit(llama()(), split_loader([token_batch(seed, 33) for seed in range(2)], run, rank))
        gc.collect()
        engines = sum(type(each) is DeepSpeedEngine for each in gc.get_objects())
        found.append((len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), engines))
    return found


def test_fits_leave_no_threads_descriptors_or_engines(pool: ProcessPool) -> None:
    for found in pool.run(held_after_fits, 4, world_size=2):
        # What an earlier test has left may go in between.
        assert all(last <= first for first, last in zip(found[0], found[-1], strict=True)), found
