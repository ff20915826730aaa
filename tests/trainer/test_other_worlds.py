"""Checkpoints that are resumed on other numbers of processes, at other ZeRO stages and in another precision."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from exact import Keep
from models import LlamaModule, token_batch
from nightly import mostly
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ulysses import UlyssesError
from lightning_ulysses.checkpoints.convert import UNIVERSAL, is_converted
from lightning_ulysses.checkpoints.manifest import read, write
from lightning_ulysses.cli.main import main
from lightning_ulysses.export import load_weights
from lightning_ulysses.testing import SplitRun, split_trainer
from lightning_ulysses.testing.processes import ProcessPool
from lightning_ulysses.testing.runs import snapshot

# Whole batches, dealt to data-parallel ranks by a sampler: the first step sees the same data in every world.
BATCHES = [token_batch(seed, 34, 1, "uneven") for seed in range(6)]


class Grouped(LlamaModule):
    """Two groups of parameters, a buffer, a frozen parameter, and a layer with gradients that no optimizer steps."""

    def __init__(self, optimizer: str = "AdamW", **settings: Any) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.frozen = nn.Parameter(torch.zeros(5), requires_grad=False)
        self.unstepped = nn.Linear(3, 2, bias=False)
        nn.init.zeros_(self.unstepped.weight)
        # At stage 3, a parameter of one module that another one asks for stays gathered.
        self.held = [self.unstepped.weight]
        self.kind, self.settings = optimizer, settings

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += 1
        ones = torch.ones(3, dtype=self.held[0].dtype)
        return super().training_step(batch, batch_idx) + 0 * self.unstepped(ones).sum()

    def configure_optimizers(self) -> Any:
        named = [(name, p) for name, p in self.model.named_parameters()]
        matrices = {"params": [p for _, p in named if p.dim() > 1], "weight_decay": 0.1}
        vectors = {"params": [p for _, p in named if p.dim() == 1], "weight_decay": 0.0, "lr": 0.003}
        return getattr(torch.optim, self.kind)([matrices, vectors], lr=0.002, **self.settings)


class Saves(L.Callback):
    """Saves after two steps."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)


def fit(
    rank: int, run: SplitRun, folder: str, resumed: str | None, kind: str, settings: dict[str, Any]
) -> tuple[dict[str, Tensor], float, list[float]]:
    keep = Keep()
    callbacks: list[L.Callback] = [keep] if resumed else [keep, Saves(f"{folder}/middle.ckpt")]
    trainer = {"gradient_clip_val": 0.5, **run.trainer}
    module = Grouped(kind, **settings)
    if not resumed:
        module.frozen.data.fill_(3.0)
        module.unstepped.weight.data.fill_(3.0)
    loader: Any = DataLoader(BATCHES, batch_size=None)  # type: ignore[arg-type]
    split_trainer(SplitRun(run.world_size, run.sp_size, run.strategy, trainer), callbacks).fit(
        module, loader, ckpt_path=resumed
    )
    decays = [group["weight_decay"] for group in module.trainer.optimizers[0].param_groups]
    others = keep.after["frozen"].sum() + keep.after["unstepped.weight"].sum()
    return keep.after, float(module.seen) + float(others), decays


def saved(pool: ProcessPool, run: SplitRun, folder: Path, kind: str = "AdamW", **settings: Any) -> dict[str, Tensor]:
    """The weights after all steps; the checkpoint after two of them is in the folder."""
    return pool.run(fit, run, str(folder), None, kind, settings, world_size=run.world_size)[0][0]


def off(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    distance = torch.cat([(found[name] - wanted[name]).flatten() for name in wanted]).norm()
    return float(distance / torch.cat([wanted[name].flatten() for name in wanted]).norm())


@pytest.mark.parametrize(
    ("first", "second", "kind", "settings"),
    [
        ((2, 2), (3, 3), "AdamW", {}),
        pytest.param((3, 3), (1, 1), "AdamW", {}, marks=pytest.mark.nightly),
        ((2, 1), (4, 2), "SGD", {"momentum": 0.9}),
        ((1, 3), (2, 3), "NAdam", {}),
        pytest.param((1, 2), (2, 3), "SGD", {}, marks=pytest.mark.nightly),
        ((2, 3), (1, 1), "Adagrad", {"lr_decay": 0.1}),
        ((2, 2), (3, 1), "RMSprop", {"centered": True, "momentum": 0.5}),
        pytest.param((1, 1), (2, 3), "AdamW", {"amsgrad": True}, marks=pytest.mark.nightly),
        ((2, 3), (2, 3), "AdamW", {}),
    ],
)
def test_another_world_and_stage(
    pool: ProcessPool, tmp_path: Path, first: Any, second: Any, kind: str, settings: Any
) -> None:
    runs = [SplitRun(world, world, {"stage": stage}) for world, stage in (first, second)]
    straight = saved(pool, runs[0], tmp_path, kind, **settings)
    path = str(tmp_path / "middle.ckpt")
    # The middle of the epoch: four more steps on the batches that follow.
    results = pool.run(fit, runs[1], str(tmp_path), path, kind, settings, world_size=second[0])
    # Not yet; also frozen parameters are exported at every stage.
    assert off(load_weights(path), straight) > 1e-4
    for found, others, decays in results:
        assert off(found, straight) <= 1e-6
        assert others == 6 + 15 + 18
        assert decays == [0.1, 0.0]
    assert is_converted(tmp_path / "middle.ckpt") == (first != second)


def test_a_conversion_is_used_again_and_never_half_of_one(pool: ProcessPool, tmp_path: Path) -> None:
    first, second = SplitRun(1, 1), SplitRun(2, 2)
    straight = saved(pool, first, tmp_path)
    path = tmp_path / "middle.ckpt"
    half = path / UNIVERSAL / "zero"
    half.mkdir(parents=True)
    for _ in range(2):
        found = pool.run(fit, second, str(tmp_path), str(path), "AdamW", {}, world_size=2)[0][0]
        assert off(found, straight) <= 1e-6
    written = (path / UNIVERSAL / "zero" / "optimizer_state.pt").stat().st_mtime_ns
    pool.run(fit, second, str(tmp_path), str(path), "AdamW", {}, world_size=2)
    assert (path / UNIVERSAL / "zero" / "optimizer_state.pt").stat().st_mtime_ns == written
    # A checkpoint of its own, without the shards.
    assert main(["convert", str(path), "--output", str(tmp_path / "other")]) == 0
    shutil.rmtree(path)
    found = pool.run(fit, second, str(tmp_path), str(tmp_path / "other"), "AdamW", {}, world_size=2)[0][0]
    assert off(found, straight) <= 1e-6


def test_a_conversion_of_another_checkpoint_is_replaced(pool: ProcessPool, tmp_path: Path) -> None:
    """A name that is saved to again, such as ``last.ckpt``, converted into the same directory."""
    path, other = tmp_path / "middle.ckpt", tmp_path / "other"
    for kind in ("SGD", "AdamW"):
        straight = saved(pool, SplitRun(1, 1), tmp_path, kind)
        for output in (other, path):
            assert main(["convert", str(path), "--output", str(output)]) == 0
            assert is_converted(output)
    for folder in (other, path):
        found = pool.run(fit, SplitRun(2, 2), "", str(folder), "AdamW", {}, world_size=2)[0][0]
        assert off(found, straight) <= 1e-6
    # Other shards, copied beside a conversion that was there.
    manifest = read(path)
    assert manifest is not None
    write(path, replace(manifest, step=7))
    assert not is_converted(path)


@pytest.mark.parametrize(("first", "second"), [("32-true", "bf16-mixed"), ("bf16-true", "32-true")])
def test_another_precision(pool: ProcessPool, tmp_path: Path, first: str, second: str) -> None:
    runs = [SplitRun(1, 1, {"stage": 2}, {"precision": precision}) for precision in (first, second)]
    straight = saved(pool, runs[0], tmp_path)
    found, others, _ = pool.run(fit, runs[1], "", str(tmp_path / "middle.ckpt"), "AdamW", {}, world_size=1)[0]
    # The last steps are computed in another precision.
    assert off(found, straight) <= 1e-2
    assert others == 6 + 15 + 18


def refused(rank: int, path: str, kind: str) -> str:
    with pytest.raises(UlyssesError) as caught:
        fit(rank, SplitRun(2, 2), "", path, kind, {})
    return str(caught.value)


def test_another_optimizer_is_refused(pool: ProcessPool, tmp_path: Path) -> None:
    saved(pool, SplitRun(2, 2), tmp_path)
    for text in pool.run(refused, str(tmp_path / "middle.ckpt"), "RMSprop", world_size=2):
        assert "a checkpoint of the optimizer AdamW to resume with RMSprop" in text


def evaluate(rank: int, path: str, run: SplitRun) -> dict[str, Tensor]:
    module = Grouped()
    loader: Any = DataLoader(BATCHES[:1], batch_size=None)  # type: ignore[arg-type]
    split_trainer(run).validate(module, loader, ckpt_path=path, verbose=False)
    return snapshot(module)


@pytest.mark.parametrize(
    ("first", "second"),
    mostly([((2, 3), (1, 2)), ((1, 2), (2, 3)), ((2, 3), (3, 3))], [((1, 2), (2, 3)), ((2, 3), (3, 3))]),
)
def test_evaluation_in_another_world(pool: ProcessPool, tmp_path: Path, first: Any, second: Any) -> None:
    runs = [SplitRun(world, world, {"stage": stage}) for world, stage in (first, second)]
    saved(pool, runs[0], tmp_path)
    path = str(tmp_path / "middle.ckpt")
    wanted = load_weights(path)
    for found in pool.run(evaluate, path, runs[1], world_size=second[0]):
        assert all(torch.equal(found[name], wanted[name]) for name in found)
