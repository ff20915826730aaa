"""Training on a stream, and resuming within it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from models import LlamaModule, count_targets, llama
from nightly import mostly
from streams import Documents, raw
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ulysses.data import PackedStream, PackingCollator
from lightning_ulysses.testing import SplitRun, StepRecorder, compare, fit_single, split_trainer
from lightning_ulysses.testing.processes import ProcessPool


class CountTokens(pl.Callback):
    """What a rank is given in each epoch."""

    def __init__(self) -> None:
        self.seen: dict[int, list[Any]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        seen = self.seen.setdefault(trainer.current_epoch, [])
        seen.append((batch["input_ids"].tolist(), trainer.strategy.mesh.sp_rank))


# Their tokens are numbered from 1 on, and the vocabulary has 61.
STREAMED = [7, 9, 1, 5, 12, 2, 10, 3, 8]


def fit_stream(
    rank: int, run: SplitRun, workers: int, callbacks: tuple[pl.Callback, ...] = (), path: str | None = None
) -> Any:
    recorder, counter = StepRecorder(), CountTokens()
    stream = PackedStream(Documents(STREAMED), 16, buffer_tokens=32, collate_fn=PackingCollator(pad_to_multiple_of=4))
    loader = DataLoader(stream, batch_size=None, num_workers=workers)
    # Lightning's default would inject a sampler into any dataset that takes one.
    trainer = split_trainer(
        SplitRun(run.world_size, run.sp_size, run.strategy, {**run.trainer, "use_distributed_sampler": True}),
        [recorder, counter, *callbacks],
    )
    trainer.fit(LlamaModule(lr=0.1), loader, ckpt_path=path)
    return recorder.result(), counter.seen


def reference_steps(replicas: int) -> list[list[dict[str, Tensor]]]:
    """The documents of every round, each a batch of its own."""
    shares = [
        list(raw(Documents(STREAMED), 16, buffer_tokens=32, num_replicas=replicas, rank=r)) for r in range(replicas)
    ]
    steps = []
    for round_ in zip(*shares, strict=True):
        kept = [d for batch in round_ for pack in batch for d in pack if (d["labels"] != -100).any()]
        steps.append([{key: value[None] for key, value in document.items()} for document in kept])
    return steps


@pytest.mark.parametrize(("sizes", "workers"), [((4, 2), 0), ((2, 2), 0)])
def test_training_on_a_stream(pool: ProcessPool, sizes: tuple[int, int], workers: int) -> None:
    world, sp = sizes
    reference = fit_single(llama(lr=0.1), reference_steps(world // sp), count_targets)
    results = pool.run(fit_stream, SplitRun(world, sp), workers, world_size=world)
    for result, _ in results:
        assert compare(result, reference).largest <= 1e-5
    for group in range(world // sp):
        # The slices of a sequence-parallel group, joined again.
        slices = [results[group * sp + i][1][0] for i in range(sp)]
        assert len({len(part) for part in slices}) == 1 == len({len(results[0][1][0]), len(slices[0])})
    assert given_tokens(results) == list(range(1, sum(STREAMED) + 1))


def given_tokens(results: list[Any]) -> list[int]:
    """The tokens that all ranks together were given, without padding, in order of size."""
    return sorted(t for _, epochs in results for seen in epochs.values() for row, _ in seen for t in row[0] if t)


def interrupt_stream(rank: int, folder: str, first: int, second: int) -> Any:
    """One step of a stream on groups of ``first``, and the rest of it on groups of ``second``."""
    saver = ModelCheckpoint(dirpath=folder, filename="middle", every_n_train_steps=1)
    stop = {"max_steps": 1, "enable_checkpointing": True}
    before = fit_stream(rank, SplitRun(4, first, trainer=stop), 0, (saver,))
    return before, fit_stream(rank, SplitRun(4, second), 0, path=f"{folder}/middle.ckpt")


@pytest.mark.parametrize(("first", "second"), mostly([(2, 2), (2, 4), (4, 4)], [(2, 2), (4, 4)]))
def test_a_trainer_resumes_within_a_stream(pool: ProcessPool, tmp_path: Path, first: int, second: int) -> None:
    results = pool.run(interrupt_stream, str(tmp_path), first, second, world_size=4)
    before, after = ([result[part] for result in results] for part in range(2))
    assert 0 < len(given_tokens(before)) < sum(STREAMED)
    assert sorted(given_tokens(before) + given_tokens(after)) == list(range(1, sum(STREAMED) + 1))
