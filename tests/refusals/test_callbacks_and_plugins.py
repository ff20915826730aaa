"""Callbacks and plugins that DeepSpeed cannot run, or not as one process would, are refused before the first step."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import LearningRateFinder, ModelPruning
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision
from lightning.pytorch.tuner import Tuner
from models import HandWritten, pair_batch

from lightning_ulysses import UlyssesError
from lightning_ulysses.testing import SplitRun, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool

BATCHES = [pair_batch(seed, 33) for seed in range(2)]


def refused(rank: int, cases: list[tuple[list[L.Callback], dict[str, Any]]]) -> list[str]:
    found = []
    for callbacks, settings in cases:
        run = SplitRun(trainer=settings)
        trainer = split_trainer(run, callbacks)
        with pytest.raises(UlyssesError) as caught:
            trainer.fit(HandWritten(), split_loader(BATCHES, run, rank))
        found.append(str(caught.value))
    trainer = split_trainer(SplitRun())
    with pytest.raises(UlyssesError) as caught:
        Tuner(trainer).lr_find(HandWritten(), split_loader(BATCHES, SplitRun(), rank))
    return [*found, str(caught.value)]


def test_they_are_refused_by_name(pool: ProcessPool) -> None:
    cases: list[tuple[list[L.Callback], dict[str, Any]]] = [
        ([ModelPruning("l1_unstructured")], {}),
        ([LearningRateFinder()], {}),
        ([], {"plugins": [MixedPrecision("bf16-mixed", "cpu")]}),
        ([], {"plugins": [DoublePrecision()]}),
        ([], {"plugins": [HalfPrecision("bf16-true")]}),
    ]
    names = [
        "ModelPruning.",
        "LearningRateFinder, which Tuner.lr_find uses",
        "plugins=[MixedPrecision(...)]",
        "plugins=[DoublePrecision(...)]",
        "plugins=[HalfPrecision(...)]",
        "LearningRateFinder, which Tuner.lr_find uses",
    ]
    for texts in pool.run(refused, cases, world_size=2):
        assert all(f"Got {name}" in text for name, text in zip(names, texts, strict=True))
