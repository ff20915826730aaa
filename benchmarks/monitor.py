"""What ``TokenCountMonitor`` costs: its share of a step, on processes of one CPU machine.

A small Llama is trained on packed rows. Every other block of steps runs without the callback, so that other work on the
machine concerns both alike.

- processor time: what all threads of the process compute in the callback's hooks and in a whole step; means over steps
  and ranks, steps that log included. Other work on the machine concerns it little.
- wall time: the same by the clock. Ranks wait for each other in the callback's collective, and would wait in the next
  step without it.
- with / without: medians over the steps of blocks with the callback, and of blocks with the same rows without it.

Values are logged every ``--log-every`` steps, as Lightning's ``log_every_n_steps``.

    python benchmarks/monitor.py                 # two minutes
    python benchmarks/monitor.py --seq-len 4096 --hidden 128
"""

from __future__ import annotations

import argparse
import math
import os
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import numpy as np
import torch
from torch import Tensor

from lightning_ulysses import TokenCountMonitor
from lightning_ulysses.data import PackingCollator
from lightning_ulysses.testing import SplitRun, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool


class Llama(L.LightningModule):
    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=1000,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        self.model: Any = LlamaForCausalLM(config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Timed(TokenCountMonitor):
    """Runs in every other block of steps, and notes what its hooks took."""

    def __init__(self, block: int, warm_up: int) -> None:
        super().__init__(report=False)
        self.block, self.warm_up = block, warm_up
        self.rows: list[tuple[float, ...]] = []
        self._begun = (0.0, 0.0)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._begun = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        active = batch_idx // self.block % 2 == 0
        wall, processor = time.perf_counter(), time.process_time()
        if active:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        else:
            # Its own steps are counted on, as if it had been there.
            self._steps = trainer.strategy.weights.steps  # type: ignore[attr-defined]
        now = time.perf_counter(), time.process_time()
        if batch_idx >= self.warm_up:
            spent = (now[0] - wall, now[1] - processor) if active else (0.0, 0.0)
            self.rows.append((float(active), now[0] - self._begun[0], now[1] - self._begun[1], *spent))


def rows(steps: int, seq_len: int) -> list[dict[str, Tensor]]:
    rng = np.random.default_rng(0)
    collate, made = PackingCollator(), []
    for _ in range(steps):
        lengths: list[int] = []
        while sum(lengths) < seq_len - 128:
            lengths.append(int(min(rng.lognormal(5, 1) + 2, seq_len - sum(lengths))))
        made.append(collate([{"input_ids": rng.integers(0, 1000, length).tolist()} for length in lengths]))
    return made


def measure(rank: int, args: argparse.Namespace) -> list[tuple[float, ...]]:
    monitor = Timed(args.block, 2 * args.block)
    run = SplitRun(args.ranks, args.ranks, trainer={"log_every_n_steps": args.log_every})
    # Each block of rows twice, once with the callback and once without.
    pairs = 1 + math.ceil(args.steps / (2 * args.block))
    made = rows(pairs * args.block, args.seq_len)
    batches = [row for first in range(0, len(made), args.block) for row in made[first : first + args.block] * 2]
    split_trainer(run, [monitor]).fit(Llama(args.hidden, args.layers), split_loader(batches, run, rank))
    return monitor.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--block", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    with ProcessPool(args.ranks, timeout=900) as pool:
        # (ranks, steps, 5)
        found = np.array(pool.run(measure, args, world_size=args.ranks))
    active = found[0, :, 0] == 1
    with_it, without = found[:, active], found[:, ~active]
    step, hook = (1e3 * np.mean(with_it[..., i]) for i in (2, 4))
    print(
        f"P={args.ranks}, S={args.seq_len}, hidden {args.hidden}, {args.layers} layers, logged every {args.log_every}"
    )
    print(f"hooks, processor time: {hook:.2f} of {step:.1f} ms, {100 * hook / step:.2f} % of a step")
    wall, waited = (1e3 * np.mean(with_it[..., i]) for i in (1, 3))
    print(f"hooks, wall time: {waited:.2f} of {wall:.1f} ms, {100 * waited / wall:.2f} %")
    for name, column in (("wall time", 1), ("processor time", 2)):
        on, off = (1e3 * np.median(each[..., column]) for each in (with_it, without))
        print(f"a step by {name}: {on:.1f} ms with the callback, {off:.1f} ms without: ratio {on / off:.3f}")


if __name__ == "__main__":
    main()
