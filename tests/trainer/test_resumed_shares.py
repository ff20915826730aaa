"""Within an epoch, a run of several data-parallel groups goes on behind the samples that all of them have used."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from models import LlamaModule, token_batch
from nightly import mostly
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_ulysses import UlyssesError
from lightning_ulysses.testing import SplitRun, split_trainer
from lightning_ulysses.testing.processes import ProcessPool

SAMPLES = 16


class Numbered(Dataset[dict[str, Tensor]]):
    """Samples with their numbers, and a name for their content, as datasets of Hugging Face have."""

    def __init__(self, numbers: range) -> None:
        self.numbers, self._fingerprint = numbers, str(numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number = self.numbers[index]
        return {key: value[0] for key, value in token_batch(number, 33, 1).items()} | {"number": torch.tensor(number)}


class Unnamed(Numbered):
    """The same without a name."""

    def __init__(self, numbers: range) -> None:
        super().__init__(numbers)
        del self._fingerprint


class Notes(LlamaModule):
    """Keeps the numbers of its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += batch["number"].tolist()
        return super().training_step({key: batch[key] for key in batch if key != "number"}, batch_idx)


class Saves(L.Callback):
    """Saves after two steps and stops."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def loader_of(kind: str, dp_rank: int, dp_size: int, is_resumed: bool) -> DataLoader[Any]:
    """The data of a data-parallel rank, divided by Lightning's sampler or by the user."""
    mine = range(dp_rank, SAMPLES, dp_size)
    if kind.startswith("dealt"):
        return DataLoader(Numbered(range(SAMPLES)), batch_size=2, shuffle=True)
    if kind == "uneven":
        mine = range(dp_rank, SAMPLES - 1, dp_size)
    if kind == f"other on {dp_rank}" and is_resumed:
        return DataLoader(Unnamed(range(100 + mine.start, 100 + mine.stop, dp_size)))
    if kind.startswith("other"):
        return DataLoader(Unnamed(mine))
    return DataLoader(Numbered(mine), shuffle=kind == "shuffled")


def fit(rank: int, run: SplitRun, kind: str, path: str, is_resumed: bool) -> list[int] | str:
    """Numbers of samples, or a refusal."""
    L.seed_everything(8 if kind == "dealt otherwise" and is_resumed else 7, verbose=False)
    loader = loader_of(kind, rank // run.sp_size, run.world_size // run.sp_size, is_resumed)
    trainer = {"use_distributed_sampler": kind.startswith("dealt")}
    run = SplitRun(run.world_size, run.sp_size, {"sequence_dims": {"number": None}}, trainer)
    module = Notes()
    try:
        split_trainer(run, [] if is_resumed else [Saves(path)]).fit(
            module, loader, ckpt_path=path if is_resumed else None
        )
    except UlyssesError as refusal:
        return str(refusal)
    return module.seen


def resumed(pool: ProcessPool, folder: Path, second: tuple[int, int], kind: str) -> tuple[list[int], list[Any]]:
    """Numbers of the samples that two groups of two ranks used, and what came of the rest in another world."""
    runs, path = [SplitRun(4, 2), SplitRun(*second)], str(folder / "middle.ckpt")
    first = pool.run(fit, runs[0], kind, path, False, world_size=4)
    assert first[0] == first[1] and first[2] == first[3]
    return first[0] + first[2], pool.run(fit, runs[1], kind, path, True, world_size=second[0])


RESUMED = list(product(["dealt", "strided", "uneven"], [(4, 2), (2, 1), (2, 2)]))


# Each kind once, and each world.
@pytest.mark.parametrize(
    ("kind", "second"), mostly(RESUMED, {*RESUMED} - {("dealt", (2, 2)), ("strided", (4, 2)), ("uneven", (2, 1))})
)
def test_no_sample_is_lost_or_used_twice(pool: ProcessPool, tmp_path: Path, kind: str, second: tuple[int, int]) -> None:
    if kind == "uneven" and second == (2, 2):
        pytest.skip("the end of an uneven epoch is another one for one group")
    used, rest = resumed(pool, tmp_path, second, kind)
    # Where groups are uneven, an epoch ends with the shorter one.
    wanted = SAMPLES - 2 * (kind == "uneven")
    assert sorted(used + [number for each in rest[:: second[1]] for number in each]) == list(range(wanted))


@pytest.mark.parametrize(
    ("kind", "second", "text"),
    [
        pytest.param("other on 0", (4, 2), "batch 1 of which is now another one", marks=pytest.mark.nightly),
        ("other on 1", (2, 1), "batch 1 of which is now another one"),
        ("dealt otherwise", (2, 2), "seed=7, resumed with seed=8"),
        ("shuffled", (2, 2), "with a RandomSampler, resumed with 1"),
    ],
)
def test_every_rank_refuses_the_other_data_of_any(
    pool: ProcessPool, tmp_path: Path, kind: str, second: tuple[int, int], text: str
) -> None:
    for refusal in resumed(pool, tmp_path, second, kind)[1]:
        assert "a checkpoint in the middle of an epoch" in refusal and text in refusal
