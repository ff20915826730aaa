"""Kills a training with SIGKILL at random moments, and shows that nothing behind the last complete checkpoint is lost.

    python benchmarks/kills.py --kills 50

Two processes train and save after every step; all are killed after a random time, also while they save. Before each new
start, the newest complete checkpoint is noted. The run must go on from it, and the weights after the last step must be
those of a run that nobody killed, bit for bit."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lightning_ulysses
from lightning_ulysses.checkpoints import manifest, newest_complete
from lightning_ulysses.export import load_weights
from lightning_ulysses.testing import QUIET
from lightning_ulysses.testing.processes import free_port
from lightning_ulysses.upstream.deepspeed import LATE_IMPORTS

PROCESSES = 2


class Tokens(Dataset[dict[str, Tensor]]):
    """Rows that differ in every epoch."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= self.length:
            raise IndexError(index)
        tokens = torch.randint(64, (1, 16))
        return {"input_ids": tokens, "labels": tokens}


class Tiny(L.LightningModule):
    """One attention layer, with weights enough for saving to take a while."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = heads
        self.embed = nn.Embedding(64, width)
        # A bias of keys has no gradient but rounding, which Adam makes large.
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, 64)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        hidden = self.embed(batch["input_ids"])
        rows, tokens, width = hidden.shape
        # (B, S_r, 3 * H * D) -> three of (B, H, S_r, D)
        q, k, v = self.qkv(hidden).view(rows, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        # (B, H, S_r, D) -> (B, S_r, H * D)
        logits = self.out(mixed.transpose(1, 2).reshape(rows, tokens, width))
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Progress(L.Callback):
    """Tells the parent process which step the run goes on from."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.connection.send(trainer.global_step)


@dataclass(frozen=True)
class Size:
    """The training: ZeRO stage, optimizer steps, and the width of the model."""

    stage: int = 3
    steps: int = 200
    width: int = 256


def train(rank: int, port: int, folder: Path, size: Size, connection: Connection) -> None:
    """One process of a run, with the environment of a launcher."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(PROCESSES), "NODE_RANK": "0"}
    os.environ.update(shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    L.seed_everything(1, verbose=False)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=1, save_last=True)
    settings = {**QUIET, "enable_checkpointing": True, "accelerator": "cpu", "devices": PROCESSES}
    trainer = L.Trainer(
        strategy=lightning_ulysses.UlyssesDeepSpeedStrategy(
            sp_size=PROCESSES, stage=size.stage, targets="labels", check_model=False
        ),
        callbacks=[saver, Progress(connection)],
        max_steps=size.steps,
        max_epochs=-1,
        accumulate_grad_batches=2,
        **settings,
    )
    trainer.fit(Tiny(size.width), DataLoader(Tokens(7), batch_size=None), ckpt_path="last")


@dataclass(frozen=True)
class Ended:
    """The step that a run went on from, None if it was killed before, and how long it trained."""

    began: int | None
    seconds: float


def run(folder: Path, size: Size, kill_after: float | None) -> Ended:
    """Runs the processes, and kills all of them some seconds after training began; None leaves them to their end."""
    # Forked from a process that has imported everything.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_ulysses.testing", *LATE_IMPORTS])
    here, there = context.Pipe(duplex=False)
    port = free_port()
    arguments = [(rank, port, folder, size, there) for rank in range(PROCESSES)]
    processes = [context.Process(target=train, args=each) for each in arguments]
    for process in processes:
        process.start()
    there.close()
    first, began = None, time.monotonic()
    with suppress(EOFError):
        first, began = here.recv(), time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            for process in processes:
                process.kill()
    for process in processes:
        process.join()
    if kill_after is None and any(process.exitcode for process in processes):
        raise SystemExit(f"a run failed: {folder.with_suffix('.log')}")
    return Ended(first, time.monotonic() - began)


def complete_step(folder: Path) -> int:
    """The step of the newest complete checkpoint; 0 without one."""
    newest = newest_complete(folder)
    found = manifest.read(Path(newest)) if newest else None
    return found.step if found is not None else 0


def survive(folder: Path, kills: int, size: Size, seed: int = 0) -> list[tuple[float, int, int]]:
    """Kills a run again and again, and compares its end with that of a run that is left alone.

    Returns:
        For each kill: the seconds after training began, and the step of the newest complete checkpoint before, after.

    Raises:
        AssertionError: If a run did not go on from the newest complete checkpoint that Lightning's "last" names, went
            back, or ended with other weights.
    """
    draws = random.Random(seed)
    (folder / "alone").mkdir(parents=True)
    (folder / "killed").mkdir()
    straight = run(folder / "alone", size, None)
    # A share of the run, so that all kills together leave something to be killed.
    length = max(2.0, 1.5 * straight.seconds / max(kills, 3))
    moments, before = [], 0
    for number in range(kills):
        after = draws.uniform(0.0, 1.0) * length
        ended = run(folder / "killed", size, after)
        assert ended.began in (None, before), f"kill {number}: went on from {ended.began}, complete was {before}"
        now = complete_step(folder / "killed")
        assert now >= before, f"kill {number}: {now} of {before} steps are left"
        moments.append((after, before, now))
        left = sorted(os.listdir(folder / "killed"))
        print(f"kill {number} after {after:.1f} s: steps {before} -> {now}, left {left}", flush=True)
        before = now
    ended = run(folder / "killed", size, None)
    # None if there was nothing left to do.
    assert ended.began in (None, before)
    found, wanted = (load_weights(newest_complete(folder / name) or "") for name in ("killed", "alone"))
    assert complete_step(folder / "killed") == size.steps
    assert all(torch.equal(found[name], wanted[name]) for name in wanted), "the weights are others than without kills"
    return moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=Path("kills"))
    args = parser.parse_args()
    moments = survive(args.folder, args.kills, Size(args.stage, args.steps, args.width))
    print(f"{len(moments)} kills, no step behind a complete checkpoint lost, the same weights bit for bit.")


if __name__ == "__main__":
    main()
