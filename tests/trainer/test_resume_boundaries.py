"""A resumed run goes on bit for bit, wherever in an epoch or an accumulation window it was saved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from models import LlamaModule, token_batch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_ulysses import PackedStream, UlyssesError
from lightning_ulysses.testing import SplitRun, split_trainer
from lightning_ulysses.testing.processes import ProcessPool


class Sized(Dataset[dict[str, Tensor]]):
    """Draws its tokens at random, other ones in every epoch."""

    def __init__(self, length: int = 7) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= self.length:
            raise IndexError(index)
        return token_batch(int(torch.randint(2**31, ())), 33)


class Endless(IterableDataset[dict[str, Tensor]]):
    """The same without a length."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for _ in range(7):
            yield token_batch(int(torch.randint(2**31, ())), 33)


Moment = tuple[str, int]


class Saves(L.Callback):
    """Saves at some moments, and notes the weights after each optimizer step and where the run is.

    Args:
        folder: Where to save.
        moments: Hooks, with the number of the last batch over all epochs.
    """

    def __init__(self, folder: str = "", moments: list[Moment] | None = None) -> None:
        self.steps: list[tuple[int, int, int, Tensor]] = []
        self.folder, self.moments = folder, moments or []
        self.saved: dict[Moment, int] = {}
        self.epochs: list[int] = []

    def _maybe(self, trainer: Any, hook: str) -> None:
        moment = hook, trainer.fit_loop.total_batch_idx
        if moment in self.moments:
            trainer.save_checkpoint(path_of(self.folder, moment))
            self.saved[moment] = len(self.steps)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.last = trainer.global_step

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.epochs.append(trainer.current_epoch)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self._maybe(trainer, "batch_start")

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > self.last:
            self.last = trainer.global_step
            weights = torch.cat([p.detach().flatten().clone() for p in module.parameters()])
            where = trainer.fit_loop.epoch_loop._batches_that_stepped
            self.steps.append((trainer.global_step, trainer.current_epoch, where, weights))
        self._maybe(trainer, "batch_end")

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self._maybe(trainer, "validation_end")

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self._maybe(trainer, "epoch_end")


def path_of(folder: str, moment: Moment) -> str:
    return f"{folder}/{moment[0]}-{moment[1]}.ckpt"


def fit(saves: Saves, data: Any, settings: dict[str, Any], resumed: str | None) -> list[Any]:
    L.seed_everything(7, verbose=False)
    run = SplitRun(2, 2, trainer={"accumulate_grad_batches": 3, **settings})
    evaluated: Any = DataLoader([token_batch(9, 33)] * 2, batch_size=None)  # type: ignore[arg-type]
    loader = DataLoader(data, batch_size=None)
    module = LlamaModule(layers=1, lr=0.01, optimizer="adamw")
    split_trainer(run, [saves]).fit(module, loader, evaluated, ckpt_path=resumed)
    return saves.steps


def interrupted(rank: int, folder: str, data: Any, moments: list[Moment], settings: dict[str, Any]) -> list[Any]:
    """For each moment: the steps that followed it, and those of a run that is resumed from it."""
    saves = Saves(folder, moments)
    straight = fit(saves, data, settings, None)
    assert set(saves.saved) == set(moments)
    return [
        (straight[saves.saved[moment] :], fit(Saves(), data, settings, path_of(folder, moment))) for moment in moments
    ]


EPOCHS: dict[str, Any] = {"max_epochs": 3}
STEPS: dict[str, Any] = {"max_epochs": -1, "max_steps": 8}
# Of each epoch, batches 0 to 2, 3 to 5, and 6 by itself make a window.
WITHIN: list[Moment] = [("batch_end", 0), ("batch_start", 5), ("batch_end", 8)]
ENDS: list[Moment] = [("batch_end", 6), ("epoch_end", 6), ("validation_end", 6)]


@pytest.mark.parametrize(
    ("data", "moments", "settings"),
    [
        (Sized(), [*WITHIN, ("batch_end", 5), ENDS[0]], EPOCHS),
        (Endless(), [WITHIN[2], *ENDS], EPOCHS),
        pytest.param(Endless(), [WITHIN[1], ENDS[0]], STEPS, marks=pytest.mark.nightly),
        (Sized(), [("validation_end", 3)], {**EPOCHS, "val_check_interval": 4}),
    ],
)
def test_every_boundary(pool: ProcessPool, tmp_path: Path, data: Any, moments: Any, settings: Any) -> None:
    for pairs in pool.run(interrupted, str(tmp_path), data, moments, settings, world_size=2):
        for moment, (straight, resumed) in zip(moments, pairs, strict=True):
            assert [step[:3] for step in resumed] == [step[:3] for step in straight], moment
            for one, other in zip(resumed, straight, strict=True):
                assert torch.equal(one[3], other[3]), (moment, one[:3])


def again(rank: int, folder: str, data: Any, hook: str, settings: dict[str, Any]) -> list[Any]:
    """Steps and begun epochs of a run that is resumed at the end of each epoch, beside those of a straight one."""
    whole = Saves()
    straight = fit(whole, data, settings, None)
    epochs, steps, path = [], [], None
    for last in (6, 13, None):
        moment = (hook, last) if last is not None else None
        saves = Saves(folder, [moment] if moment else [])
        found = fit(saves, data, settings, path)
        # Up to where the next run goes on.
        steps += found[: saves.saved[moment]] if moment else found
        epochs.append(saves.epochs)
        path = path_of(folder, moment) if moment else None
    return [(straight, steps), (whole.epochs, epochs)]


@pytest.mark.parametrize(
    ("data", "hook", "settings"),
    [
        pytest.param(Sized(), "batch_end", EPOCHS, marks=pytest.mark.nightly),
        pytest.param(Sized(), "batch_end", STEPS, marks=pytest.mark.nightly),
        (Sized(), "validation_end", STEPS),
        pytest.param(Sized(), "epoch_end", STEPS, marks=pytest.mark.nightly),
        (Sized(), "epoch_end", EPOCHS),
        (Endless(), "batch_end", STEPS),
    ],
)
def test_resumed_at_the_end_of_each_epoch(
    pool: ProcessPool, tmp_path: Path, data: Any, hook: str, settings: dict[str, Any]
) -> None:
    for steps, (whole, epochs) in pool.run(again, str(tmp_path), data, hook, settings, world_size=2):
        straight, resumed = steps
        assert [step[:3] for step in resumed] == [step[:3] for step in straight]
        for one, other in zip(resumed, straight, strict=True):
            assert torch.equal(one[3], other[3]), one[:3]
        # Each run begins the epochs that are left.
        assert epochs == [whole, whole[1:], whole[2:]]


class Fails(Saves):
    """Fails in the step on one batch."""

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        if trainer.fit_loop.total_batch_idx == 5:
            trainer.save_checkpoint(f"{self.folder}/failed.ckpt")
            raise ValueError("for this test")


def failed(rank: int, folder: str) -> list[Any]:
    straight = fit(Saves(), Sized(), EPOCHS, None)
    with pytest.raises(ValueError, match="for this test"):
        fit(Fails(folder), Sized(), EPOCHS, None)
    return [straight[1:], fit(Saves(), Sized(), EPOCHS, f"{folder}/failed.ckpt")]


def test_a_step_that_failed_is_taken_again(pool: ProcessPool, tmp_path: Path) -> None:
    """In the last micro-batch of a window, before the optimizer's step."""
    for straight, resumed in pool.run(failed, str(tmp_path), world_size=2):
        assert [step[:3] for step in resumed] == [step[:3] for step in straight]
        assert all(torch.equal(one[3], other[3]) for one, other in zip(resumed, straight, strict=True))


def documents(seed: int, count: int = 60) -> list[Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return [
        torch.randint(1, 50, (int(torch.randint(3, 12, (), generator=draws)),), generator=draws) for _ in range(count)
    ]


def stream(seed: int = 0, max_tokens: int = 32, **settings: Any) -> DataLoader[Any]:
    return DataLoader(PackedStream(documents(seed), max_tokens, buffer_tokens=512, **settings), batch_size=None)


def rows(seed: int = 0, length: int = 8, batch_size: int = 1, **settings: Any) -> DataLoader[Any]:
    samples = [{key: value[0] for key, value in token_batch(seed + i, 33, 1).items()} for i in range(length)]
    return DataLoader(samples, batch_size=batch_size, **settings)  # type: ignore[arg-type]


CHANGES = [
    (rows, {}, {"length": 9}, "length=8, resumed with length=9"),
    (rows, {}, {"batch_size": 2}, "batch_size=1, resumed with batch_size=2"),
    (rows, {}, {"drop_last": True}, "drop_last=False, resumed with drop_last=True"),
    (rows, {}, {"shuffle": True}, "sampler='SequentialSampler', resumed with sampler='RandomSampler'"),
    (rows, {}, {"seed": 100}, "batch 2 of which is now another one"),
    (stream, {}, {"max_tokens": 24}, "max_tokens=32, resumed with max_tokens=24"),
    (stream, {}, {"rows_per_batch": 2}, "rows_per_batch=1, resumed with rows_per_batch=2"),
    (stream, {}, {"seed": 1}, "batch 2 of which is now another one"),
]


def changed(rank: int, folder: str) -> list[str]:
    """What resuming in the middle of an epoch says to other data; the first of each kind are the same."""
    texts = []
    run = SplitRun(2, 2, trainer={"max_steps": 3, "max_epochs": -1})
    for make in (rows, stream):
        split_trainer(run).fit(module := LlamaModule(layers=1), make())
        module.trainer.save_checkpoint(f"{folder}/{make.__name__}.ckpt")
    run = SplitRun(2, 2, trainer={"max_steps": 4, "max_epochs": -1})
    for make, _, change, _ in [(rows, 0, {}, 0), (stream, 0, {}, 0), *CHANGES]:  # type: ignore[list-item]
        try:
            split_trainer(run).fit(LlamaModule(layers=1), make(**change), ckpt_path=f"{folder}/{make.__name__}.ckpt")
            texts.append("")
        except UlyssesError as error:
            texts.append(str(error))
    return texts


def test_other_data_in_the_middle_of_an_epoch_are_refused(pool: ProcessPool, tmp_path: Path) -> None:
    for texts in pool.run(changed, str(tmp_path), world_size=2):
        assert texts[:2] == ["", ""]
        for text, (*_, wanted) in zip(texts[2:], CHANGES, strict=True):
            assert "a checkpoint in the middle of an epoch" in text and wanted in text
