"""How one thing that Lightning offers is run and what is compared of it, for the table of features."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import feature_modules as modules
import lightning as L
import torch
from feature_modules import BATCHES, EVEN, Logged
from lightning.pytorch import callbacks as ready
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ulysses import UlyssesDeepSpeedStrategy
from lightning_ulysses.testing import QUIET

Values = dict[str, Any]
EXACT, REFUSED, DIFFERS = "exact", "refused", "differs"


def seen_by_default(trainer: L.Trainer, module: L.LightningModule) -> Values:
    """Counters and all that was logged."""
    counters = {"step": trainer.global_step, "epoch": trainer.current_epoch}
    return {**counters, **{name: float(value) for name, value in trainer.callback_metrics.items()}}


@dataclass(frozen=True)
class Feature:
    """One thing that Lightning offers.

    Attributes:
        title: For the page.
        verdict: `EXACT`, `REFUSED` or `DIFFERS`.
        why: Part of the message of a refusal; for a difference, the reason.
        trainer: Settings of the Trainer, made in each process; given a folder.
        module: Makes the module.
        seen: What is compared besides the weights.
        use: Runs the Trainer.
        strategy: Settings of the strategy.
    """

    title: str
    verdict: str = EXACT
    why: str = ""
    trainer: Callable[[Path], Values] = field(default=lambda folder: {})
    module: Callable[[], L.LightningModule] = Logged
    seen: Callable[[Any, Any], Values] = seen_by_default
    use: Callable[[L.Trainer, L.LightningModule], Any] | None = None
    strategy: Values = field(default_factory=dict)


def loader(batches: Sequence[Any] = BATCHES) -> DataLoader[Any]:
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]


def fit(trainer: L.Trainer, module: L.LightningModule) -> None:
    trainer.fit(module, loader(), DataLoader(BATCHES[:2], batch_size=None))  # type: ignore[arg-type]


def with_callback(make: Callable[..., Any], *args: Any, **more: Any) -> Callable[[Path], Values]:
    return lambda folder: {"callbacks": [make(*args)], **more}


def flags(**settings: Any) -> Callable[[Path], Values]:
    return lambda folder: copy.deepcopy(settings)


def best_checkpoint(trainer: L.Trainer, module: Any) -> Values:
    callback: Any = trainer.checkpoint_callback
    return {
        "score": float(callback.best_model_score),
        "best": Path(callback.best_model_path).name,
        "step": trainer.global_step,
    }


def with_checkpoints(folder: Path, **settings: Any) -> Values:
    callback = ready.ModelCheckpoint(folder, monitor="val_loss", filename="{epoch}-{step}", **settings)
    return {"callbacks": [callback], "enable_checkpointing": True, "max_epochs": 3}


def attributes_of(name: str, *attributes: str) -> Callable[[Any, Any], Values]:
    def seen(trainer: Any, module: Any) -> Values:
        callback = next(each for each in trainer.callbacks if type(each).__name__ == name)
        found = {attribute: getattr(callback, attribute) for attribute in attributes}
        return {**seen_by_default(trainer, module), **found}

    return seen


def csv_rows(trainer: Any, module: Any) -> Values:
    """What a CSVLogger has written."""
    with open(Path(trainer.logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return {f"{number} {name}": float(value) for number, row in enumerate(rows) for name, value in row.items() if value}


def resume(trainer: L.Trainer, module: L.LightningModule) -> Values:
    """Trains an epoch, and the second one from its checkpoint."""
    assert trainer.max_epochs == 1
    fit(trainer, module)
    folder = Path(trainer.default_root_dir) / "resumed.ckpt"
    trainer.save_checkpoint(folder)
    assert trainer.fit_loop.max_epochs is not None
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(), ckpt_path=str(folder))
    return {}


def predict(trainer: L.Trainer, module: L.LightningModule) -> Values:
    found: Any = trainer.predict(module, loader())
    return {f"predicted {number}": float(each.double().square().sum()) for number, each in enumerate(found)}


def test(trainer: L.Trainer, module: L.LightningModule) -> Values:
    (found,) = trainer.test(module, loader(), verbose=False)
    return dict(found)


def validate(trainer: L.Trainer, module: L.LightningModule) -> Values:
    found = trainer.validate(module, [loader(), loader()], verbose=False)
    return {name: value for each in found for name, value in each.items()}


def write_predictions(trainer: L.Trainer, module: L.LightningModule) -> Values:
    (writer,) = (each for each in trainer.callbacks if isinstance(each, modules.Writer))  # type: ignore[attr-defined]
    trainer.predict(module, loader(), return_predictions=False)
    return {str(number): value for number, value in enumerate(writer.sums)}


def time_left(trainer: Any, module: Any) -> Values:
    callback = next(each for each in trainer.callbacks if isinstance(each, ready.Timer))
    return {
        **seen_by_default(trainer, module),
        "counts": callback.time_elapsed() > 0,
        "left": callback.time_remaining() > 0,
    }


def learning_rates(trainer: Any, module: Any) -> Values:
    (monitor,) = (each for each in trainer.callbacks if isinstance(each, ready.LearningRateMonitor))
    return {
        f"{name} {number}": rate for name, rates in monitor.lrs.items() for number, rate in enumerate(rates)
    } | csv_rows(trainer, module)


def with_csv(folder: Path) -> Values:
    return {"logger": CSVLogger(folder, name=""), "log_every_n_steps": 1}


def fit_evenly(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Batches that have equally many targets."""
    trainer.fit(module, loader(EVEN))


def fit_that_raises(trainer: L.Trainer, module: L.LightningModule) -> Values:
    try:
        fit(trainer, module)
    except RuntimeError as error:
        return {"error": "nan" in str(error).lower()}
    return {"error": False}


def made_by(name: str, /, **settings: Any) -> Callable[[], L.LightningModule]:
    return partial(getattr(modules, name), **settings)


def run_feature(feature: Feature, folder: Path, is_split: bool) -> tuple[dict[str, Tensor], Values, str]:
    """Weights, what was seen, and the message of a refusal."""
    torch.manual_seed(0)
    module = feature.module()
    # Deterministic mode is that of the process.
    deterministic = torch.are_deterministic_algorithms_enabled()
    settings = {**QUIET, "accelerator": "cpu", "max_epochs": 2, "use_distributed_sampler": False}
    settings |= feature.trainer(folder)
    if is_split:
        settings |= {"devices": 2, "strategy": UlyssesDeepSpeedStrategy(sp_size=2, **feature.strategy)}
    else:
        settings |= {"devices": 1}
    try:
        trainer = L.Trainer(**settings)
        seen = (feature.use or fit)(trainer, module)
        weights = {name: value.detach().clone() for name, value in module.named_parameters()}
        return weights, {**feature.seen(trainer, module), **(seen if isinstance(seen, dict) else {})}, ""
    except Exception as error:
        return {}, {}, str(error)
    finally:
        torch.use_deterministic_algorithms(deterministic)
