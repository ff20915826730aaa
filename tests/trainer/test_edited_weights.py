"""Weights that hooks and callbacks edit are trained on as edited, although ZeRO steps from a copy of them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from exact import BOUND, Keep
from models import HandWritten, pair_batch
from nightly import mostly
from torch import Tensor

from lightning_ulysses import UlyssesError
from lightning_ulysses.export import load_weights
from lightning_ulysses.testing import QUIET, SplitRun, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool

# All labels, so that the mean over micro-batches of one process is the mean over targets.
BATCHES = [pair_batch(seed, 33) for seed in range(4)]


class Decays(L.Callback):
    """Edits weights at other places, and past autograd; gathers them at stage 3, as everybody must there."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with gathered(pl_module.head.weight):
            pl_module.head.weight.data.zero_()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        with gathered(pl_module.embed.weight):
            pl_module.embed.weight.data.mul_(0.9)

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        with gathered(pl_module.place.weight):
            pl_module.place.weight.data.add_(0.01)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        for parameter in pl_module.blocks.parameters():
            with gathered(parameter):
                parameter.data = parameter.data * 0.95


class Loads(HandWritten):
    def on_fit_start(self) -> None:
        self.load_state_dict({name: value * 0.9 for name, value in HandWritten().state_dict().items()})


class LoadsInSetup(HandWritten):
    def setup(self, stage: str) -> None:
        self.load_state_dict({name: value * 0.9 for name, value in HandWritten().state_dict().items()})


class Clamps(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        with torch.no_grad():
            for parameter in pl_module.parameters():
                with gathered(parameter):
                    parameter.clamp_(-0.5, 0.5)


def gathered(parameter: Any) -> Any:
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([parameter], modifier_rank=0)


def alone(make: Any, callbacks: list[L.Callback], batches: list[Any], **kwargs: Any) -> dict[str, Tensor]:
    keep = Keep()
    trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=1, callbacks=[*callbacks, keep], **{**QUIET, **kwargs})
    trainer.fit(make(), split_loader(batches, SplitRun(1, 1), 0))
    return keep.after


def split(rank: int, make: Any, callbacks: list[L.Callback], run: SplitRun, folder: str) -> dict[str, Tensor]:
    keep = Keep()
    trainer = split_trainer(run, [*callbacks, keep])
    trainer.fit(make(), split_loader(BATCHES, run, rank))
    trainer.save_checkpoint(folder)
    return keep.after


def off(found: dict[str, Tensor], wanted: dict[str, Tensor], before: dict[str, Tensor]) -> float:
    change = torch.cat([(wanted[name] - before[name]).double().flatten() for name in wanted])
    wrong = torch.cat([(found[name] - wanted[name]).double().flatten() for name in wanted])
    return float(wrong.norm() / change.norm())


# No parameter is so small that every rank keeps it.
RELEASED: dict[str, Any] = {
    "config": {
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
}
# At stage 3, on_fit_start comes when parameters are partitioned.
CASES = [
    (Loads, [], {"stage": 1}),
    (Loads, [Clamps()], {"stage": 2}),
    (HandWritten, [Decays()], {"stage": 2}),
    (HandWritten, [Decays()], {"stage": 3}),
    (LoadsInSetup, [Clamps()], RELEASED),
]


@pytest.mark.parametrize(("make", "callbacks", "strategy"), mostly(CASES, CASES[:1]))
def test_edited_weights_are_trained_and_saved(
    pool: ProcessPool, make: Any, callbacks: list[L.Callback], strategy: dict[str, Any], tmp_path: Path
) -> None:
    start = HandWritten().state_dict()
    wanted, plain = alone(make, callbacks, BATCHES), alone(HandWritten, [], BATCHES)
    run, folder = SplitRun(strategy=strategy), str(tmp_path / "run.ckpt")
    for found in pool.run(split, make, callbacks, run, folder, world_size=2):
        assert off(found, wanted, start) <= BOUND < 1e-2 < off(found, plain, start)
    # The last edit came after the last step.
    assert off(load_weights(folder), wanted, start) <= BOUND


class Ungathered(L.Callback):
    """Edits, at stage 3, tensors that are empty."""

    def __init__(self, hook: str, only_first: bool = False) -> None:
        def edit(trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            if not only_first or trainer.is_global_zero:
                pl_module.head.weight.data.mul_(0.5)

        setattr(self, hook, edit)


def refused(rank: int, make: Any, callbacks: list[L.Callback], strategy: dict[str, Any]) -> str:
    run = SplitRun(strategy=strategy)
    with pytest.raises(UlyssesError) as caught:
        split_trainer(run, callbacks).fit(make(), split_loader(BATCHES, run, rank))
    return str(caught.value)


@pytest.mark.parametrize(
    ("make", "hook", "only_first"),
    [(Loads, None, False), (HandWritten, "on_train_start", False), (HandWritten, "on_train_batch_start", True)],
)
def test_edits_of_what_is_not_there_are_refused(pool: ProcessPool, make: Any, hook: Any, only_first: bool) -> None:
    name = f"Ungathered.{hook}" if hook else "Loads.on_fit_start"
    for text in pool.run(refused_edit, make, hook, only_first, RELEASED, world_size=2):
        assert f"Got {name}, which edits" in text


def refused_edit(rank: int, make: Any, hook: str | None, only_first: bool, strategy: dict[str, Any]) -> str:
    return refused(rank, make, [Ungathered(hook, only_first)] if hook else [], strategy)
