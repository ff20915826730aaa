"""What TokenCountMonitor counts and logs, against counts made by hand."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from models import VOCAB, LlamaModule, token_batch
from packs import document_lengths
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ulysses import TokenCountMonitor
from lightning_ulysses.callbacks.token_report import CSV_NAME, PNG_NAME, read_csv
from lightning_ulysses.data import CostModel, PackingCollator
from lightning_ulysses.loss.token_mean import TokenMean
from lightning_ulysses.testing import SplitRun, fit_single, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool

PEAK = 1e9


@dataclass
class Known:
    """A batch and, for each of its tokens (B, S), the number of its document; -1 for padding."""

    batch: dict[str, Tensor]
    owner: Tensor

    def targets(self) -> Tensor:
        """(B, S): whether the token has a target, by hand."""
        labels, found = self.batch["labels"], torch.zeros_like(self.owner, dtype=torch.bool)
        for row, place in [(r, t) for r in range(found.shape[0]) for t in range(found.shape[1] - 1)]:
            same = self.owner[row, place] == self.owner[row, place + 1] != -1
            found[row, place] = same and labels[row, place + 1] != -100
        return found


def plain(seed: int, seq_len: int, rows: int) -> Known:
    batch = token_batch(seed, seq_len, rows, "uneven")
    return Known(batch, torch.zeros(rows, seq_len, dtype=torch.long))


def masked(seed: int, real: int, padding: int) -> Known:
    """Rows of which the second one is padded."""
    known = plain(seed, real + padding, 2)
    known.owner[1, real:] = -1
    known.batch["labels"][1, real:] = -100
    known.batch["attention_mask"] = (known.owner != -1).long()
    return known


def packed(seed: int, *packs: tuple[int, ...]) -> Known:
    generator = torch.Generator().manual_seed(seed)
    rows = [[torch.randint(1, VOCAB, (n,), generator=generator) for n in lengths] for lengths in packs]
    documents = [[{"input_ids": t, "labels": t.clone()} for t in pack] for pack in rows]
    documents[0][0]["labels"][:4] = -100
    batch = PackingCollator(pad_to_multiple_of=8)(documents if len(packs) > 1 else documents[0])
    seq_len = batch["input_ids"].shape[1]
    owner = [[i for i, n in enumerate(lengths) for _ in range(n)] for lengths in packs]
    return Known(batch, torch.tensor([row + [-1] * (seq_len - len(row)) for row in owner]))


KNOWN = [
    plain(0, 33, 2),
    packed(1, (5, 21, 10)),
    masked(2, 20, 11),
    packed(3, (9, 8), (30,), (2, 3, 4)),
    plain(4, 27, 1),
    packed(5, (40, 17, 3)),
    plain(6, 40, 1),
    packed(7, (16, 16)),
]


def by_hand(known: Known, sp_size: int, sp_rank: int) -> dict[str, float]:
    owner, begin = known.owner, 0
    shares = [len(part) for part in np.array_split(np.arange(owner.shape[1]), sp_size)]
    begin = sum(shares[:sp_rank])
    here = slice(begin, begin + shares[sp_rank])
    starts = torch.ones_like(owner, dtype=torch.bool)
    starts[:, 1:] = owner[:, 1:] != owner[:, :-1]
    # Attention computes padding as well: as a document of its own where there are several.
    has_mask = "attention_mask" in known.batch
    computed = [torch.bincount(row + 1) for row in (torch.zeros_like(owner) if has_mask else owner)]
    return {
        "targets": float(known.targets()[:, here].sum()),
        "tokens": float(owner[:, here].numel()),
        "padding": float((owner[:, here] == -1).sum()),
        "documents": float((starts & (owner != -1))[:, here].sum()),
        "pairs": float(sum((n**2).sum() for n in document_lengths(owner))) / sp_size,
        "squares": float(sum((n**2).sum() for n in computed)) / sp_size,
    }


def steps_by_hand(run: SplitRun, micro: int) -> list[list[dict[str, float]]]:
    """For each step and rank the sums over its micro-batches."""
    dp_size = run.world_size // run.sp_size
    steps = []
    for first in range(0, len(KNOWN), dp_size * micro):
        ranks = []
        for rank in range(run.world_size):
            mine = KNOWN[first + rank // run.sp_size : first + dp_size * micro : dp_size]
            parts = [by_hand(known, run.sp_size, rank % run.sp_size) for known in mine]
            ranks.append({name: sum(part[name] for part in parts) for name in parts[0]})
        steps.append(ranks)
    return steps


def known_of(batch: Any) -> Known:
    return next(known for known in KNOWN if known.batch is batch)


def sum_of_targets(batch: Any) -> float:
    return float(known_of(batch).targets().sum())


class ByDocument(LlamaModule):
    """Trains on each document by itself."""

    def __init__(self) -> None:
        super().__init__(lr=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        known, total = known_of(batch), torch.zeros(())
        targets = known.targets()
        for row, owner in enumerate(known.owner):
            for number in owner[owner >= 0].unique():
                places = owner == number
                logits = self.model(input_ids=batch["input_ids"][row, places][None]).logits[0]
                has = targets[row, places].nonzero().flatten()
                each = torch.nn.functional.cross_entropy(
                    logits[has], batch["labels"][row, places][has + 1], reduction="sum"
                )
                total = total + each
        return total / targets.sum()


class NoReads(TorchDispatchMode):
    """Notes every operation that makes the host wait for a value of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


class Watched(TokenCountMonitor):
    """Keeps what was logged, and whether a hook read a value."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.logged: list[dict[str, float]] = []
        self.mode = NoReads()
        self.joined: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        before = self._history.steps[-1:]
        with self.mode:
            super().on_train_batch_end(trainer, *args)
        if self._steps > len(self.logged):
            self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        assert not before or self._history.steps[-1] - before[0] in (0, 1)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        mean = TokenMean()
        mean.update(torch.tensor(float(trainer.global_rank)), 2.0 * trainer.global_rank + 1)
        mean.update(torch.tensor(math.nan), 0.0)
        with mean.sync_context():
            saved = {name: float(value) for name, value in mean.state_dict().items()}
        self.joined = [float(mean.compute()), saved["total"], saved["count"]]


def watch(rank: int, run: SplitRun, folder: str) -> dict[str, Any]:
    monitor = Watched(peak_flops=PEAK, report_dir=f"{folder}/{rank}")
    trainer = split_trainer(run, [monitor])
    trainer.fit(LlamaModule(lr=0.1), split_loader([known.batch for known in KNOWN], run, rank))
    return {
        "logged": monitor.logged,
        "reads": monitor.mode.reads,
        "joined": monitor.joined,
        "epoch": float(trainer.callback_metrics["train/loss_epoch"]),
    }


@pytest.mark.parametrize("run", [SplitRun(2, 2), SplitRun(4, 2)])
def test_counts_against_those_made_by_hand(pool: ProcessPool, run: SplitRun, tmp_path: Path) -> None:
    run = SplitRun(run.world_size, run.sp_size, trainer={"accumulate_grad_batches": 2, "log_every_n_steps": 1})
    results = pool.run(watch, run, str(tmp_path), world_size=run.world_size)
    wanted = steps_by_hand(run, 2)
    micro = 2 * run.world_size // run.sp_size
    windows = [[known.batch for known in KNOWN[i : i + micro]] for i in range(0, len(KNOWN), micro)]
    reference = fit_single(ByDocument, windows, sum_of_targets)

    assert [(tmp_path / str(rank)).exists() for rank in range(run.world_size)] == [True] + [False] * (
        run.world_size - 1
    )
    table = read_csv(tmp_path / "0" / CSV_NAME)
    assert table["step"].tolist() == [float(s + 1) for s in range(len(wanted)) for _ in range(run.world_size)]
    assert table["rank"].tolist() == [float(r) for _ in wanted for r in range(run.world_size)]
    for name in ("targets", "tokens", "padding", "documents"):
        assert table[name].tolist() == [rank[name] for step in wanted for rank in step], name
    cost = CostModel.from_config(LlamaModule().model.config)
    for step, ranks in enumerate(wanted):
        rows = {name: values[table["step"] == step + 1] for name, values in table.items()}
        total = {name: sum(rank[name] for rank in ranks) for name in ranks[0]}
        work = [cost.per_token * rank["tokens"] + cost.per_pair * rank["squares"] for rank in ranks]
        values = {
            "train/loss": reference.losses[step],
            "train/perplexity": math.exp(reference.losses[step]),
            "tokens/global": total["tokens"] - total["padding"],
            "tokens/padding_fraction": total["padding"] / total["tokens"],
            "tokens/imbalance": max(work) * len(work) / sum(work),
            "memory/peak_gib": max(rows["peak_gib"]),
        }
        for result in results:
            found = result["logged"][step]
            assert {name: found[name] for name in values} == pytest.approx(values, rel=1e-5)
            assert ("throughput/tokens_per_sec" in found) == ("throughput/mfu" in found) == (step > 0)
        assert rows["weight"] == pytest.approx([rank["targets"] / total["targets"] for rank in ranks])
        assert rows["loss"] == pytest.approx(reference.losses[step], rel=1e-5)
        assert rows["imbalance"] == pytest.approx(values["tokens/imbalance"])
        operations = 3 * (cost.per_token * values["tokens/global"] + cost.per_pair * total["pairs"])
        if step:
            assert rows["mfu"] * rows["seconds"] * PEAK * len(ranks) == pytest.approx(operations, rel=1e-6)
            assert results[0]["logged"][step]["throughput/mfu"] == pytest.approx(rows["mfu"][0], rel=1e-5)
            assert rows["tokens_per_sec"] * rows["seconds"] == pytest.approx(values["tokens/global"])
        else:
            assert np.isnan(rows["seconds"]).all() and np.isnan(rows["mfu"]).all()

    shares = [sum(r["targets"] for r in step) for step in wanted]
    mean = np.average(reference.losses, weights=shares)
    ranks = range(run.world_size)
    count, sum_over_ranks = sum(2 * r + 1 for r in ranks), sum(r * (2 * r + 1) for r in ranks)
    for result in results:
        # The progress bar is off, and the one flush copies a block.
        assert result["reads"] == 0
        assert result["epoch"] == pytest.approx(mean, rel=1e-5)
        assert result["joined"] == pytest.approx([sum_over_ranks / count, sum_over_ranks, count])
        for name in ("train/loss", "tokens/imbalance", "memory/peak_gib", "tokens/padding_fraction"):
            assert [step[name] for step in result["logged"]] == [step[name] for step in results[0]["logged"]]
    assert (tmp_path / "0" / PNG_NAME).stat().st_size > 10_000


class TwoLoaders(LlamaModule):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.training_step(batch, batch_idx)


def resume(rank: int, folder: str, stage: int) -> dict[str, Any]:
    batches = [token_batch(seed, 24, 2, "uneven") for seed in range(6)]

    def fit(name: str, monitor: TokenCountMonitor, path: str | None = None, **settings: Any) -> L.Trainer:
        run = SplitRun(2, 2, {"stage": stage}, {"logger": CSVLogger(folder, name), "log_every_n_steps": 2, **settings})
        saver = ModelCheckpoint(dirpath=f"{folder}/{name}", filename="{step}", every_n_train_steps=2, save_top_k=-1)
        extra = [saver] if settings else []
        trainer = split_trainer(run, [monitor, *extra])
        loader = split_loader(batches, run, rank)
        trainer.fit(LlamaModule(lr=0.1), loader, loader if path else None, ckpt_path=path)
        return trainer

    monitor = TokenCountMonitor()
    straight = fit("straight", monitor)
    # The same callback in a run that begins anew, and in one that goes on behind the checkpoint.
    fit("interrupted", monitor, enable_checkpointing=True, max_steps=3)
    path = f"{folder}/interrupted/step=2.ckpt"
    resumed = fit("resumed", TokenCountMonitor(), path)
    fit("again", monitor, path)
    several = split_trainer(SplitRun(), [TokenCountMonitor()])
    loaders = [split_loader(batches[:2], SplitRun(), rank), split_loader(batches[2:3], SplitRun(), rank)]
    several.validate(TwoLoaders(), loaders, verbose=False)
    metrics = {"straight": straight, "resumed": resumed, "several": several}
    return {key: {k: float(v) for k, v in trainer.callback_metrics.items()} for key, trainer in metrics.items()}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_run_reports_the_steps_before(pool: ProcessPool, tmp_path: Path, stage: int) -> None:
    metrics = pool.run(resume, str(tmp_path), stage, world_size=2)[0]
    tables = {name: read_csv(tmp_path / name / "version_0" / CSV_NAME) for name in ("straight", "resumed", "again")}
    interrupted = read_csv(tmp_path / "interrupted" / "version_0" / CSV_NAME)
    assert interrupted["step"].tolist() == [1, 1, 2, 2, 3, 3]
    for name in ("resumed", "again"):
        assert tables[name]["step"].tolist() == [step for step in range(1, 7) for _ in range(2)]
        for column in ("step", "rank", "targets", "weight", "tokens", "padding", "documents", "imbalance", "loss"):
            assert tables[name][column] == pytest.approx(tables["straight"][column], rel=1e-6), column
    assert metrics["resumed"]["train/loss_epoch"] == pytest.approx(metrics["straight"]["train/loss_epoch"], rel=1e-6)
    assert metrics["resumed"]["validate/perplexity"] == pytest.approx(math.exp(metrics["resumed"]["validate/loss"]))
    # Loggers write every second step, and throughput is that of the steps in between.
    with (tmp_path / "straight" / "version_0" / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["tokens/global"]]
    assert [row["step"] for row in logged] == ["1", "3", "5"]
    for index, row in enumerate(logged[1:], start=1):
        steps = {name: values[4 * index : 4 * index + 4] for name, values in tables["straight"].items()}
        speed = (steps["tokens"] - steps["padding"]).sum() / (steps["seconds"].sum() / 2)
        assert float(row["throughput/tokens_per_sec"]) == pytest.approx(speed, rel=1e-5)
        assert float(row["train/loss"]) == pytest.approx(steps["loss"][-1], rel=1e-6)
        assert float(row["tokens/global"]) == (steps["tokens"] - steps["padding"])[2:].sum()
    several = metrics["several"]
    assert set(several) == {f"validate/{kind}/dataloader_{i}" for kind in ("loss", "perplexity") for i in range(2)}
    for index in range(2):
        loss, perplexity = (several[f"validate/{kind}/dataloader_{index}"] for kind in ("loss", "perplexity"))
        assert perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_several_means_at_once() -> None:
    """Each by its own targets; shapes that would make every pair of them are refused."""
    means, targets = torch.tensor([2.0, math.nan, 5.0]), torch.tensor([3.0, 0.0, 1.0])
    together, alone = TokenMean(), TokenMean()
    together.update(means, targets)
    for mean, count in zip(means, targets, strict=True):
        alone.update(mean, count)
    assert float(together.compute()) == float(alone.compute()) == 11 / 4
    together.update(means[[0, 2]], 2.0)
    assert float(together.compute()) == (11 + 2 * 7) / (4 + 2 * 2)
    with pytest.raises(RuntimeError, match="must match"):
        together.update(means[:, None], targets)


def test_a_mean_survives_its_state() -> None:
    mean = TokenMean()
    mean.update(torch.tensor(2.0), 3)
    mean.update(torch.tensor(math.nan), 0)
    mean.update(torch.tensor(math.nan), torch.tensor(0.0))
    other = TokenMean()
    other.load_state_dict(mean.state_dict())
    for each in (mean, other):
        each.update(torch.tensor(6.0), torch.tensor(1.0))
        assert float(each.compute()) == 3.0
