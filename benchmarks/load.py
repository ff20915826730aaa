"""What a process keeps of 50 fits and of 2,000 steps: threads, descriptors, objects and memory.

    python benchmarks/load.py                          # about ten minutes
    python benchmarks/load.py --fits 10 --steps 200

Fits take turns between ZeRO stages 2 and 3, each with a Trainer and a module of its own, in the same two processes. The
first fits, in which modules are imported and caches filled, are left out of the growth.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / "support"), str(Path(__file__).parents[1])]

import lightning as L  # noqa: E402
from models import llama, token_batch  # noqa: E402

from lightning_ulysses.testing import ProcessPool, SplitRun, split_loader, split_trainer  # noqa: E402

WARM_UP = 6


@dataclass(frozen=True)
class Held:
    """What a process holds.

    Args:
        threads: Of the process.
        descriptors: Open files and sockets.
        objects: That Python's collector knows.
        items: In lists, dictionaries and sets, the largest of them.
        kilobytes: Resident memory.
    """

    threads: int
    descriptors: int
    objects: int
    items: int
    kilobytes: int


def held() -> Held:
    """What this process holds now."""
    gc.collect()
    objects = gc.get_objects()
    largest = max(len(each) for each in objects if type(each) in (list, dict, set) and each is not objects)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
    counts = (len(os.listdir(f"/proc/self/{name}")) for name in ("task", "fd"))
    return Held(*counts, len(objects), largest, resident)


class Note(L.Callback):
    """Notes what the process holds after every so many steps."""

    def __init__(self, every: int) -> None:
        self.every, self.found = every, []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self.every == 0:
            self.found.append(held())


def fits(rank: int, count: int) -> list[Held]:
    """What is held after each of several fits."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    found = []
    for number in range(count):
        run = SplitRun(2, 2, {"stage": 2 + number % 2})
        batches = [token_batch(seed, 33) for seed in range(2)]
        split_trainer(run).fit(llama()(), split_loader(batches, run, rank))
        found.append(held())
    return found


def steps(rank: int, count: int, stage: int) -> list[Held]:
    """What is held at ten moments of one fit."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    run, note = SplitRun(2, 2, {"stage": stage}), Note(max(1, count // 10))
    batches = [token_batch(seed, 33) for seed in range(8)] * -(-count // 8)
    split_trainer(run, [note]).fit(llama(lr=0.01)(), split_loader(batches[:count], run, rank))
    return note.found


def growth(found: list[Held], warm_up: int) -> str:
    """The first and last of what was found, behind the warm-up, and the growth of memory for each."""
    first, last, count = found[warm_up], found[-1], len(found) - 1 - warm_up
    kilobytes = (last.kilobytes - first.kilobytes) / max(1, count)
    return f"{first}\n  {last}\n  {kilobytes:.0f} KiB for each of {count}"


def main() -> None:
    """Prints the growth of rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fits", type=int, default=50)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    with ProcessPool(2, timeout=3600.0) as pool:
        if args.fits:
            print(f"{args.fits} fits:\n  {growth(pool.run(fits, args.fits, world_size=2)[0], WARM_UP)}", flush=True)
        for stage in (2, 3):
            if args.steps:
                found = pool.run(steps, args.steps, stage, world_size=2)[0]
                print(f"{args.steps} steps, stage {stage}, ten moments:\n  {growth(found, 1)}", flush=True)


if __name__ == "__main__":
    main()
