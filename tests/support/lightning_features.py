"""What Lightning offers around a step, each on two processes against one plain one: exact, refused or different.

python tests/support/lightning_features.py    # writes docs/features.md
"""

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
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ulysses import UlyssesDeepSpeedStrategy
from lightning_ulysses.testing import QUIET

PAGE = Path(__file__).parents[2] / "docs" / "features.md"
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


def run(rank: int, name: str, folder: str, is_split: bool) -> tuple[dict[str, Tensor], Values, str]:
    """Weights, what was seen, and the message of a refusal."""
    feature = FEATURES[name]
    torch.manual_seed(0)
    module = feature.module()
    # Deterministic mode is that of the process.
    deterministic = torch.are_deterministic_algorithms_enabled()
    settings = {**QUIET, "accelerator": "cpu", "max_epochs": 2, "use_distributed_sampler": False}
    settings |= feature.trainer(Path(folder))
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


def _callback(make: Callable[..., Any], *args: Any, **more: Any) -> Callable[[Path], Values]:
    return lambda folder: {"callbacks": [make(*args)], **more}


def _flags(**flags: Any) -> Callable[[Path], Values]:
    return lambda folder: copy.deepcopy(flags)


def _best(trainer: L.Trainer, module: Any) -> Values:
    callback: Any = trainer.checkpoint_callback
    return {
        "score": float(callback.best_model_score),
        "best": Path(callback.best_model_path).name,
        "step": trainer.global_step,
    }


def _checkpointed(folder: Path, **settings: Any) -> Values:
    callback = ready.ModelCheckpoint(folder, monitor="val_loss", filename="{epoch}-{step}", **settings)
    return {"callbacks": [callback], "enable_checkpointing": True, "max_epochs": 3}


def _of(name: str, *attributes: str) -> Callable[[Any, Any], Values]:
    def seen(trainer: Any, module: Any) -> Values:
        callback = next(each for each in trainer.callbacks if type(each).__name__ == name)
        found = {attribute: getattr(callback, attribute) for attribute in attributes}
        return {**seen_by_default(trainer, module), **found}

    return seen


def _rows(trainer: Any, module: Any) -> Values:
    """What a CSVLogger has written."""
    with open(Path(trainer.logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return {f"{number} {name}": float(value) for number, row in enumerate(rows) for name, value in row.items() if value}


def _resume(trainer: L.Trainer, module: L.LightningModule) -> Values:
    """Trains an epoch, and the second one from its checkpoint."""
    assert trainer.max_epochs == 1
    fit(trainer, module)
    folder = Path(trainer.default_root_dir) / "resumed.ckpt"
    trainer.save_checkpoint(folder)
    assert trainer.fit_loop.max_epochs is not None
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(), ckpt_path=str(folder))
    return {}


def _predict(trainer: L.Trainer, module: L.LightningModule) -> Values:
    found: Any = trainer.predict(module, loader())
    return {f"predicted {number}": float(each.double().square().sum()) for number, each in enumerate(found)}


def _test(trainer: L.Trainer, module: L.LightningModule) -> Values:
    (found,) = trainer.test(module, loader(), verbose=False)
    return dict(found)


def _validate(trainer: L.Trainer, module: L.LightningModule) -> Values:
    found = trainer.validate(module, [loader(), loader()], verbose=False)
    return {name: value for each in found for name, value in each.items()}


def _written(trainer: L.Trainer, module: L.LightningModule) -> Values:
    (writer,) = (each for each in trainer.callbacks if isinstance(each, modules.Writer))  # type: ignore[attr-defined]
    trainer.predict(module, loader(), return_predictions=False)
    return {str(number): value for number, value in enumerate(writer.sums)}


def _remaining(trainer: Any, module: Any) -> Values:
    callback = next(each for each in trainer.callbacks if isinstance(each, ready.Timer))
    return {
        **seen_by_default(trainer, module),
        "counts": callback.time_elapsed() > 0,
        "left": callback.time_remaining() > 0,
    }


def _rates(trainer: Any, module: Any) -> Values:
    (monitor,) = (each for each in trainer.callbacks if isinstance(each, ready.LearningRateMonitor))
    return {
        f"{name} {number}": rate for name, rates in monitor.lrs.items() for number, rate in enumerate(rates)
    } | _rows(trainer, module)


def _csv(folder: Path) -> Values:
    return {"logger": CSVLogger(folder, name=""), "log_every_n_steps": 1}


def _evenly(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Batches that have equally many targets."""
    trainer.fit(module, loader(EVEN))


def _raises(trainer: L.Trainer, module: L.LightningModule) -> Values:
    try:
        fit(trainer, module)
    except RuntimeError as error:
        return {"error": "nan" in str(error).lower()}
    return {"error": False}


def _hooks(name: str, /, **settings: Any) -> Callable[[], L.LightningModule]:
    return partial(getattr(modules, name), **settings)


CALLBACKS = {
    "checkpoint": Feature("`ModelCheckpoint(monitor=..., save_top_k=1)`", trainer=_checkpointed, seen=_best),
    "checkpoint_last": Feature(
        "`ModelCheckpoint(save_last=True, every_n_train_steps=2)`",
        trainer=lambda folder: {
            "callbacks": [ready.ModelCheckpoint(folder, save_last=True, every_n_train_steps=2, save_top_k=-1)],
            "enable_checkpointing": True,
        },
        seen=lambda trainer, module: {
            "files": sorted(p.name for p in Path(trainer.checkpoint_callback.dirpath).iterdir())
        },
    ),
    "stopping": Feature(
        "`EarlyStopping`",
        trainer=_callback(partial(ready.EarlyStopping, "val_loss", mode="max", patience=1), max_epochs=5),
        seen=_of("EarlyStopping", "stopped_epoch", "wait_count"),
    ),
    "rates": Feature(
        "`LearningRateMonitor`",
        trainer=lambda folder: {**_csv(folder), "callbacks": [ready.LearningRateMonitor()]},
        module=_hooks("Scheduled"),
        seen=_rates,
    ),
    "accumulation": Feature(
        "`GradientAccumulationScheduler`",
        REFUSED,
        "does not support `accumulate_grad_batches` changing",
        trainer=_callback(ready.GradientAccumulationScheduler, {0: 1, 1: 2}),
    ),
    "ema": Feature(
        "`EMAWeightAveraging`, stages 1 and 2", trainer=_callback(partial(ready.EMAWeightAveraging, decay=0.5))
    ),
    "ema_stage_3": Feature(
        "`WeightAveraging` and its kinds, stage 3",
        REFUSED,
        "EMAWeightAveraging with ZeRO stage 3",
        trainer=_callback(partial(ready.EMAWeightAveraging, decay=0.5)),
        strategy={"stage": 3},
    ),
    "averaging": Feature("`WeightAveraging`, stages 1 and 2", trainer=_callback(ready.WeightAveraging)),
    "swa": Feature(
        "`StochasticWeightAveraging`",
        REFUSED,
        "SWA does not currently support sharded models",
        trainer=_callback(ready.StochasticWeightAveraging, 0.05, 1, max_epochs=4),
    ),
    "timer": Feature("`Timer`", trainer=_callback(partial(ready.Timer, "00:01:00:00")), seen=_remaining),
    "lambda": Feature(
        "`LambdaCallback`, and every hook of a `Callback` that leaves gradients alone",
        trainer=_callback(modules.Counter),
        seen=_of("Counter", "calls"),
    ),
    "summary": Feature("`ModelSummary`", trainer=_callback(ready.ModelSummary)),
    "progress": Feature(
        "`TQDMProgressBar`",
        trainer=lambda folder: {"callbacks": [ready.TQDMProgressBar()], "enable_progress_bar": True},
    ),
    "stats": Feature(
        "`DeviceStatsMonitor`, of rank 0",
        trainer=lambda folder: {**_csv(folder), "callbacks": [ready.DeviceStatsMonitor(cpu_stats=False)]},
    ),
    "freezing": Feature(
        "`BaseFinetuning`",
        REFUSED,
        "The Finetuning callback does not support running with the DeepSpeed strategy",
        trainer=_callback(modules.Unfreeze),
    ),
    "writer": Feature(
        "`BasePredictionWriter`",
        trainer=_callback(modules.Writer, "batch"),
        use=_written,
    ),
    "pruning": Feature(
        "`ModelPruning`", REFUSED, "ModelPruning", trainer=_callback(ready.ModelPruning, "l1_unstructured")
    ),
    "finder": Feature(
        "`LearningRateFinder`", REFUSED, "LearningRateFinder", trainer=_callback(ready.LearningRateFinder)
    ),
    "gradients": Feature(
        "A callback that reads or edits `.grad`",
        REFUSED,
        "which uses the .grad of",
        trainer=_callback(modules.ScalesGradients),
    ),
}

FLAGS = {
    "csv": Feature("`logger=CSVLogger(...)`", trainer=_csv, seen=_rows),
    "own_logger": Feature(
        "`logger=` one of your own, on rank 0",
        trainer=lambda folder: {"logger": modules.Remembers(), "log_every_n_steps": 1},
        seen=lambda trainer, module: (
            {
                f"{number} {name}": value
                for number, each in enumerate(trainer.logger.logged)
                for name, value in each.items()
            }
            if trainer.is_global_zero
            else {}
        ),
    ),
    "clip": Feature("`gradient_clip_val=0.01`", trainer=_flags(gradient_clip_val=0.01)),
    "clip_value": Feature(
        "`gradient_clip_algorithm='value'`",
        REFUSED,
        "gradient_clip_algorithm='value'",
        trainer=_flags(gradient_clip_val=0.01, gradient_clip_algorithm="value"),
    ),
    "accumulate": Feature(
        "`accumulate_grad_batches=2`, batches of equally many targets",
        trainer=_flags(accumulate_grad_batches=2),
        use=_evenly,
    ),
    "accumulate_uneven": Feature(
        "`accumulate_grad_batches=3`, other batches, or an incomplete last window",
        DIFFERS,
        "micro-batches count by their targets, so that each step is the mean over all of them",
        trainer=_flags(accumulate_grad_batches=3),
    ),
    "double": Feature(
        "`precision='64-true'`", REFUSED, "`precision` must be one of", trainer=_flags(precision="64-true")
    ),
    "bf16": Feature(
        "`precision='bf16-mixed'`, `'bf16-true'`",
        DIFFERS,
        "as far from float32 as one process is",
        trainer=_flags(precision="bf16-true"),
    ),
    "plugin": Feature(
        "`plugins=[MixedPrecision(...)]` and other precision plugins",
        REFUSED,
        "plugins=[MixedPrecision(...)]",
        trainer=lambda folder: {"plugins": [MixedPrecision("bf16-mixed", "cpu")]},
    ),
    "limit_train": Feature("`limit_train_batches=3`", trainer=_flags(limit_train_batches=3)),
    "limit_val": Feature("`limit_val_batches=1`", trainer=_flags(limit_val_batches=1)),
    "limit_others": Feature(
        "`limit_test_batches=2`, `limit_predict_batches`", trainer=_flags(limit_test_batches=2), use=_test
    ),
    "val_interval": Feature("`val_check_interval=2`", trainer=_flags(val_check_interval=2)),
    "val_epochs": Feature("`check_val_every_n_epoch=2`", trainer=_flags(check_val_every_n_epoch=2, max_epochs=3)),
    "overfit": Feature("`overfit_batches=2`", trainer=_flags(overfit_batches=2)),
    "fast": Feature("`fast_dev_run=2`", trainer=_flags(fast_dev_run=2)),
    "anomaly": Feature("`detect_anomaly=True`", trainer=_flags(detect_anomaly=True, max_epochs=1)),
    "deterministic": Feature("`deterministic=True`", trainer=_flags(deterministic=True, max_epochs=1)),
    "max_steps": Feature("`max_steps=3`", trainer=_flags(max_steps=3, max_epochs=-1)),
    "min_steps": Feature(
        "`min_steps=6`, `min_epochs`",
        trainer=_callback(partial(ready.EarlyStopping, "val_loss", mode="max", patience=0), min_steps=6, max_epochs=5),
    ),
    "max_time": Feature("`max_time='00:01:00:00'`", trainer=_flags(max_time="00:01:00:00")),
    "sanity": Feature("`num_sanity_val_steps=1`", trainer=_flags(num_sanity_val_steps=1)),
    "reload": Feature(
        "`reload_dataloaders_every_n_epochs=1`",
        trainer=_flags(reload_dataloaders_every_n_epochs=1),
        module=_hooks("OwnData"),
        use=lambda trainer, module: trainer.fit(module),
    ),
    "batchnorm": Feature(
        "`sync_batchnorm=True` with batch norm over tokens, after the blocks",
        trainer=_flags(sync_batchnorm=True),
        module=_hooks("Normed"),
    ),
    "benchmark": Feature("`benchmark=True`", trainer=_flags(benchmark=True, max_epochs=1)),
    "inference": Feature("`inference_mode=False`", trainer=_flags(inference_mode=False)),
    "profiler": Feature(
        "`profiler=SimpleProfiler()`",
        trainer=lambda folder: {"profiler": SimpleProfiler(folder, "profile")},
        seen=lambda trainer, module: {
            "times": len(trainer.profiler.recorded_durations["run_training_batch"]),
            **seen_by_default(trainer, module),
        },
    ),
    "every": Feature(
        "`log_every_n_steps=2`", trainer=lambda folder: {**_csv(folder), "log_every_n_steps": 2}, seen=_rows
    ),
    "barebones": Feature(
        "`barebones=True`",
        trainer=lambda folder: (
            dict.fromkeys(
                (
                    "logger",
                    "enable_checkpointing",
                    "enable_progress_bar",
                    "enable_model_summary",
                    "num_sanity_val_steps",
                )
            )
            | {"barebones": True}
        ),
        seen=lambda trainer, module: {"step": trainer.global_step},
    ),
    "resume": Feature(
        "`fit(ckpt_path=...)`", trainer=lambda folder: {"max_epochs": 1, "default_root_dir": folder}, use=_resume
    ),
    "validate": Feature("`validate` on several dataloaders", use=_validate),
    "test": Feature("`test`", use=_test),
    "predict": Feature("`predict`", use=_predict),
}

HOOKS = {
    "batch_start": Feature("`on_train_batch_start` returning -1", module=_hooks("Stops")),
    "clipping": Feature(
        "`configure_gradient_clipping` with `self.clip_gradients`", module=_hooks("OwnClipping", kind="norm")
    ),
    "clipping_value": Feature(
        "`configure_gradient_clipping` by value",
        REFUSED,
        "clip_gradients(gradient_clip_algorithm='value')",
        module=_hooks("OwnClipping", kind="value"),
    ),
    "before_step": Feature("`on_before_optimizer_step` that leaves `.grad` alone", module=_hooks("BeforeStep")),
    "after_backward": Feature(
        "`on_after_backward` that reads `.grad`", REFUSED, "which uses the .grad of", module=_hooks("ReadsGradients")
    ),
    "scheduler": Feature("`lr_scheduler_step`, and a scheduler by steps", module=_hooks("OwnSchedule")),
    "plateau": Feature("`ReduceLROnPlateau` with `monitor`", trainer=_flags(max_epochs=4), module=_hooks("Plateau")),
    "optimizer_step": Feature("`optimizer_step` overridden, with its closure", module=_hooks("OwnStep")),
    "manual": Feature("Manual optimization, one backward a step", module=_hooks("Manual", backwards=1)),
    "manual_late": Feature(
        "A number that manual optimization logs after its backward",
        DIFFERS,
        "each rank logs that of its slice, which a warning says",
        module=_hooks("Manual", backwards=1, logs_late=True),
    ),
    "manual_twice": Feature(
        "Manual optimization, two backwards a step",
        REFUSED,
        "backward passes without an optimizer step",
        module=_hooks("Manual", backwards=2),
    ),
    "two_optimizers": Feature("Two optimizers", REFUSED, "2 optimizers", module=_hooks("TwoOptimizers")),
    "none": Feature("`training_step` returning None", REFUSED, "None from", module=_hooks("Returns", kind="none")),
    "mapping": Feature("`training_step` returning a dict", module=_hooks("Returns", kind="dict")),
    "iterator": Feature(
        "`training_step(dataloader_iter)`", REFUSED, "training_step(dataloader_iter)", module=_hooks("TakesIterator")
    ),
    "epoch_ends": Feature("`on_train_epoch_end`, `on_validation_epoch_end` that log", module=_hooks("EpochEnds")),
    "late": Feature("`configure_model`", module=_hooks("Late")),
    "own_callbacks": Feature("`configure_callbacks`", trainer=_flags(max_epochs=5), module=_hooks("OwnCallbacks")),
    "transfer": Feature("`on_after_batch_transfer`, `transfer_batch_to_device`", module=_hooks("Transfers")),
    "saving": Feature(
        "`on_save_checkpoint`, `on_load_checkpoint`, `save_hyperparameters`",
        trainer=lambda folder: {"max_epochs": 1, "default_root_dir": folder},
        module=_hooks("Saves"),
        use=_resume,
        seen=lambda trainer, module: {"kept": module.kept, **seen_by_default(trainer, module)},
    ),
    "edits": Feature("`on_train_batch_end` that edits weights, stages 1 and 2", module=_hooks("Edits")),
    "metrics": Feature("A metric of torchmetrics, updated in steps on tokens", module=_hooks("Measured")),
    "gathers": Feature(
        "`self.all_gather`",
        DIFFERS,
        "one value for each rank, two of which share a sequence",
        module=_hooks("Gathers"),
        seen=lambda trainer, module: {"gathered": module.gathered},
    ),
    "sync_dist": Feature("`self.log(..., sync_dist=True)`", module=_hooks("Synced")),
    "nan": Feature(
        "`detect_anomaly=True` and a step that gives NaN",
        trainer=_flags(detect_anomaly=True),
        module=_hooks("Returns", kind="nan"),
        use=_raises,
        seen=lambda trainer, module: {},
    ),
}

GROUPS = {"Callbacks": CALLBACKS, "Trainer": FLAGS, "Module hooks": HOOKS}
FEATURES = {name: feature for group in GROUPS.values() for name, feature in group.items()}


def table() -> str:
    """The text of docs/features.md."""
    head = (
        "# Lightning features\n\n"
        "Each row ran on two processes that share a sequence and on one plain process, in float32. Exact: weights,\n"
        "steps, epochs, and all that is logged or that the feature reports are the same. Refused: before or in the\n"
        "first step, with a message that says so. `tests/trainer/test_lightning_features.py` runs every row;\n"
        "`python tests/support/lightning_features.py` writes this file.\n"
    )
    parts = []
    for title, group in GROUPS.items():
        rows = "".join(f"| {each.title} | {each.verdict} | {_shown(each)} |\n" for each in group.values())
        parts.append(f"\n## {title}\n\n| Feature | Result | Message or reason |\n| --- | --- | --- |\n{rows}")
    return head + "".join(parts)


def _shown(feature: Feature) -> str:
    return feature.why.replace("`", "") if feature.verdict == REFUSED else feature.why


if __name__ == "__main__":
    PAGE.write_text(table())
