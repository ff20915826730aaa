"""Resumes checkpoints of each world and ZeRO stage in each other one, and prints how far the weights are off.

    python benchmarks/worlds.py

Worlds of 1, 2, 3 and 4 processes with stages 1, 2 and 3, in pairs: 144 resumed runs. Each run takes two steps, saves,
and takes four more; the resumed run takes the last four. What is printed is the relative L2 distance of their weights.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from typing import Any

import lightning as L
import torch
from kills import Tiny, Tokens
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ulysses.testing import SplitRun, split_trainer
from lightning_ulysses.testing.processes import ProcessPool
from lightning_ulysses.testing.runs import snapshot

BOUND = 1e-6


def fit(rank: int, world: int, stage: int, folder: str, resumed: str | None) -> Tensor:
    """The weights at the end, (numbers,)."""
    L.seed_everything(1, verbose=False)
    run = SplitRun(world, world, {"stage": stage, "targets": "labels", "check_model": False}, {"max_steps": 6})
    module = Tiny(96, heads=4)
    trainer = split_trainer(run, [Ends("" if resumed else f"{folder}/{world}-{stage}.ckpt")])
    trainer.fit(module, DataLoader(Tokens(8), batch_size=None), ckpt_path=resumed)
    return module.after


class Ends(L.Callback):
    """Saves after two steps, and gathers the weights at the end."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if self.path and trainer.global_step == 2:
            trainer.save_checkpoint(self.path)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.after = torch.cat([value.flatten() for value in snapshot(pl_module).values()])  # type: ignore[assignment]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    places = list(itertools.product(args.worlds, args.stages))
    worst = 0.0
    with ProcessPool(max(args.worlds)) as pool, tempfile.TemporaryDirectory() as folder:
        for world, stage in places:
            wanted = pool.run(fit, world, stage, folder, None, world_size=world)[0]
            path = f"{folder}/{world}-{stage}.ckpt"
            row = []
            for other, to in places:
                found = pool.run(fit, other, to, folder, path, world_size=other)[0]
                row.append(float((found - wanted).norm() / wanted.norm()))
            worst = max(worst, *row)
            print(f"{world} processes, stage {stage}: {' '.join(f'{value:.1e}' for value in row)}", flush=True)
    print(f"largest {worst:.1e}, bound {BOUND:.0e}")
    if worst > BOUND:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
