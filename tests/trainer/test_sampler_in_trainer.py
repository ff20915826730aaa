"""The sampler in a Trainer with default flags."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from nightly import mostly
from torch import Tensor
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_ulysses import UlyssesDeepSpeedStrategy, UlyssesError
from lightning_ulysses.data import PackingCollator, SequenceShardSampler
from lightning_ulysses.testing import QUIET
from lightning_ulysses.testing.processes import ProcessPool

LENGTHS = [7, 30, 12, 25, 9, 18, 3, 22, 28, 5, 14, 16, 11, 20, 70]


def documents() -> list[dict[str, list[int]]]:
    """Every token of a document is its number."""
    return [{"input_ids": [number] * length} for number, length in enumerate(LENGTHS)]


class Attention(L.LightningModule):
    """Keeps the tokens that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(16, 16)
        self.steps = 0
        self.seen: dict[int, list[Counter[int]]] = {}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        real = batch["input_ids"][batch["real"]]
        self.seen.setdefault(self.trainer.current_epoch, []).append(Counter(real.tolist()))
        # (B, S_r, 16) -> (B, 4, S_r, 4) and back
        heads = self.table(batch["input_ids"]).unflatten(-1, (4, 4)).transpose(1, 2)
        attended = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        logits = attended.transpose(1, 2).flatten(-2)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())

    def configure_optimizers(self) -> Any:
        self.steps = int(self.trainer.estimated_stepping_batches)
        return torch.optim.SGD(self.parameters(), lr=0.1)


def collate(rows: list[Any]) -> dict[str, Tensor]:
    batch = PackingCollator(80)([{**row, "real": [True] * len(row["input_ids"])} for row in rows])
    return {key: batch[key] for key in ("input_ids", "shift_labels", "position_ids", "real")}


def fit(
    rank: int,
    strategy: str,
    workers: int,
    trainer: dict[str, Any],
    sp_size: int = 2,
    path: str | None = None,
    callbacks: tuple[L.Callback, ...] = (),
    loader_type: type[DataLoader[Any]] = DataLoader,
) -> tuple[dict[int, list[Counter[int]]], int]:
    module = Attention()
    sampler = SequenceShardSampler(documents(), "input_ids", 64, overlong="split")
    loader = loader_type(
        sampler.packed,  # type: ignore[arg-type]
        sampler=sampler,
        batch_size=None,
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
        persistent_workers=workers > 0,
    )
    run = UlyssesDeepSpeedStrategy(sp_size=sp_size, sequence_dims={"real": 1}) if strategy == "ulysses" else strategy
    devices = 1 if strategy == "auto" else 4 if strategy == "ulysses" and not workers else 2
    settings = {**QUIET, "max_epochs": 2, **trainer}
    fresh = L.Trainer(accelerator="cpu", devices=devices, strategy=run, callbacks=list(callbacks), **settings)
    fresh.fit(module, loader, ckpt_path=path)
    return module.seen, module.steps


@pytest.mark.parametrize(("strategy", "world", "workers"), [("ulysses", 4, 0), ("ulysses", 2, 1), ("ddp", 2, 0)])
def test_every_document_once_per_epoch(pool: ProcessPool, strategy: str, world: int, workers: int) -> None:
    results = [seen for seen, _ in pool.run(fit, strategy, workers, {}, world_size=world)]
    shares = []
    for epoch in range(2):
        steps = {len(seen[epoch]) for seen in results}
        assert len(steps) == 1
        together = sum((step for seen in results for step in seen[epoch]), Counter[int]())
        assert together == Counter(dict(enumerate(LENGTHS)))
        shares.append([seen[epoch] for seen in results])
    assert shares[0] != shares[1]


def interrupt(
    rank: int, folder: str, first: int, second: int, stateful: bool
) -> tuple[list[Counter[int]], dict[int, list[Counter[int]]]]:
    """Two steps of an epoch on groups of ``first``, the rest and another epoch on groups of ``second``."""
    saver = ModelCheckpoint(dirpath=folder, filename="middle", every_n_train_steps=1)
    stop = {"max_steps": 1, "enable_checkpointing": True}
    kind = StatefulDataLoader if stateful else DataLoader
    before, _ = fit(rank, "ulysses", 0, stop, first, callbacks=(saver,), loader_type=kind)
    after, _ = fit(rank, "ulysses", 0, {}, second, f"{folder}/middle.ckpt", loader_type=kind)
    return before[0], after


@pytest.mark.parametrize(
    ("first", "second", "stateful"),
    mostly(
        [(2, 2, False), (2, 4, False), (4, 2, False), (4, 1, False), (2, 2, True), (2, 4, True)],
        [(2, 2, False), (4, 2, False), (4, 1, False), (2, 2, True)],
    ),
)
def test_a_resumed_epoch_goes_on_behind_what_was_used(
    pool: ProcessPool, tmp_path: Path, first: int, second: int, stateful: bool
) -> None:
    results = pool.run(interrupt, str(tmp_path), first, second, stateful, world_size=4)
    for epoch in range(2):
        steps = [step for before, after in results for step in (before if epoch == 0 else []) + after[epoch]]
        assert sum(steps, Counter[int]()) == Counter(dict(enumerate(LENGTHS)))


def test_limited_epochs(pool: ProcessPool) -> None:
    for seen, _ in pool.run(fit, "ulysses", 0, {"limit_train_batches": 2}, world_size=4):
        assert {epoch: len(steps) for epoch, steps in seen.items()} == {0: 2, 1: 2}


def test_steps_are_known_to_configure_optimizers(pool: ProcessPool) -> None:
    for seen, steps in pool.run(fit, "ulysses", 0, {}, world_size=4):
        assert steps == sum(map(len, seen.values()))


def fit_batch_sampler(rank: int) -> str:
    sampler = SequenceShardSampler(documents(), "input_ids", 80)
    loader = DataLoader(documents(), batch_sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]
    run = UlyssesDeepSpeedStrategy(sp_size=2, sequence_dims={"real": 1})
    with pytest.raises(UlyssesError) as caught:
        L.Trainer(accelerator="cpu", devices=2, strategy=run, max_steps=1, **QUIET).fit(Attention(), loader)
    return str(caught.value)


def test_batch_samplers_are_told_their_place(pool: ProcessPool) -> None:
    for text in pool.run(fit_batch_sampler, world_size=2):
        assert "batch_sampler=SequenceShardSampler" in text
        assert "sampler=sampler, batch_size=None" in text
    alone = SequenceShardSampler(documents(), "input_ids", 80, num_replicas=1, rank=0)
    loader = DataLoader(documents(), batch_sampler=alone, collate_fn=collate)  # type: ignore[arg-type]
    assert not hasattr(alone, "batch_size") and len(list(loader)) == len(alone)


def test_one_process() -> None:
    seen, steps = fit(0, "auto", 0, {})
    assert steps == sum(map(len, seen.values()))
    assert sum(seen[1], Counter[int]()) == Counter(dict(enumerate(LENGTHS)))
