"""What Lightning offers around a step, each on two processes against one plain one: exact, refused or different.

python tests/support/lightning_features.py    # writes docs/features.md
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import feature_modules as modules
from feature_runs import (
    DIFFERS,
    REFUSED,
    Feature,
    Values,
    attributes_of,
    best_checkpoint,
    csv_rows,
    fit_evenly,
    fit_that_raises,
    flags,
    learning_rates,
    made_by,
    predict,
    resume,
    run_feature,
    seen_by_default,
    test,
    time_left,
    validate,
    with_callback,
    with_checkpoints,
    with_csv,
    write_predictions,
)
from lightning.pytorch import callbacks as ready
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor

PAGE = Path(__file__).parents[2] / "docs" / "features.md"
CALLBACKS = {
    "checkpoint": Feature(
        "`ModelCheckpoint(monitor=..., save_top_k=1)`", trainer=with_checkpoints, seen=best_checkpoint
    ),
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
        trainer=with_callback(partial(ready.EarlyStopping, "val_loss", mode="max", patience=1), max_epochs=5),
        seen=attributes_of("EarlyStopping", "stopped_epoch", "wait_count"),
    ),
    "rates": Feature(
        "`LearningRateMonitor`",
        trainer=lambda folder: {**with_csv(folder), "callbacks": [ready.LearningRateMonitor()]},
        module=made_by("Scheduled"),
        seen=learning_rates,
    ),
    "accumulation": Feature(
        "`GradientAccumulationScheduler`",
        REFUSED,
        "does not support `accumulate_grad_batches` changing",
        trainer=with_callback(ready.GradientAccumulationScheduler, {0: 1, 1: 2}),
    ),
    "ema": Feature(
        "`EMAWeightAveraging`, stages 1 and 2", trainer=with_callback(partial(ready.EMAWeightAveraging, decay=0.5))
    ),
    "ema_stage_3": Feature(
        "`WeightAveraging` and its kinds, stage 3",
        REFUSED,
        "EMAWeightAveraging with ZeRO stage 3",
        trainer=with_callback(partial(ready.EMAWeightAveraging, decay=0.5)),
        strategy={"stage": 3},
    ),
    "averaging": Feature("`WeightAveraging`, stages 1 and 2", trainer=with_callback(ready.WeightAveraging)),
    "swa": Feature(
        "`StochasticWeightAveraging`",
        REFUSED,
        "SWA does not currently support sharded models",
        trainer=with_callback(ready.StochasticWeightAveraging, 0.05, 1, max_epochs=4),
    ),
    "timer": Feature("`Timer`", trainer=with_callback(partial(ready.Timer, "00:01:00:00")), seen=time_left),
    "lambda": Feature(
        "`LambdaCallback`, and every hook of a `Callback` that leaves gradients alone",
        trainer=with_callback(modules.Counter),
        seen=attributes_of("Counter", "calls"),
    ),
    "summary": Feature("`ModelSummary`", trainer=with_callback(ready.ModelSummary)),
    "progress": Feature(
        "`TQDMProgressBar`",
        trainer=lambda folder: {"callbacks": [ready.TQDMProgressBar()], "enable_progress_bar": True},
    ),
    "stats": Feature(
        "`DeviceStatsMonitor`, of rank 0",
        trainer=lambda folder: {**with_csv(folder), "callbacks": [ready.DeviceStatsMonitor(cpu_stats=False)]},
    ),
    "freezing": Feature(
        "`BaseFinetuning`",
        REFUSED,
        "The Finetuning callback does not support running with the DeepSpeed strategy",
        trainer=with_callback(modules.Unfreeze),
    ),
    "writer": Feature(
        "`BasePredictionWriter`",
        trainer=with_callback(modules.Writer, "batch"),
        use=write_predictions,
    ),
    "pruning": Feature(
        "`ModelPruning`", REFUSED, "ModelPruning", trainer=with_callback(ready.ModelPruning, "l1_unstructured")
    ),
    "finder": Feature(
        "`LearningRateFinder`", REFUSED, "LearningRateFinder", trainer=with_callback(ready.LearningRateFinder)
    ),
    "gradients": Feature(
        "A callback that reads or edits `.grad`",
        REFUSED,
        "which uses the .grad of",
        trainer=with_callback(modules.ScalesGradients),
    ),
}

FLAGS = {
    "csv": Feature("`logger=CSVLogger(...)`", trainer=with_csv, seen=csv_rows),
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
    "clip": Feature("`gradient_clip_val=0.01`", trainer=flags(gradient_clip_val=0.01)),
    "clip_value": Feature(
        "`gradient_clip_algorithm='value'`",
        REFUSED,
        "gradient_clip_algorithm='value'",
        trainer=flags(gradient_clip_val=0.01, gradient_clip_algorithm="value"),
    ),
    "accumulate": Feature(
        "`accumulate_grad_batches=2`, batches of equally many targets",
        trainer=flags(accumulate_grad_batches=2),
        use=fit_evenly,
    ),
    "accumulate_uneven": Feature(
        "`accumulate_grad_batches=3`, other batches, or an incomplete last window",
        DIFFERS,
        "micro-batches count by their targets, so that each step is the mean over all of them",
        trainer=flags(accumulate_grad_batches=3),
    ),
    "double": Feature(
        "`precision='64-true'`", REFUSED, "`precision` must be one of", trainer=flags(precision="64-true")
    ),
    "bf16": Feature(
        "`precision='bf16-mixed'`, `'bf16-true'`",
        DIFFERS,
        "as far from float32 as one process is",
        trainer=flags(precision="bf16-true"),
    ),
    "plugin": Feature(
        "`plugins=[MixedPrecision(...)]` and other precision plugins",
        REFUSED,
        "plugins=[MixedPrecision(...)]",
        trainer=lambda folder: {"plugins": [MixedPrecision("bf16-mixed", "cpu")]},
    ),
    "limit_train": Feature("`limit_train_batches=3`", trainer=flags(limit_train_batches=3)),
    "limit_val": Feature("`limit_val_batches=1`", trainer=flags(limit_val_batches=1)),
    "limit_others": Feature(
        "`limit_test_batches=2`, `limit_predict_batches`", trainer=flags(limit_test_batches=2), use=test
    ),
    "val_interval": Feature("`val_check_interval=2`", trainer=flags(val_check_interval=2)),
    "val_epochs": Feature("`check_val_every_n_epoch=2`", trainer=flags(check_val_every_n_epoch=2, max_epochs=3)),
    "overfit": Feature("`overfit_batches=2`", trainer=flags(overfit_batches=2)),
    "fast": Feature("`fast_dev_run=2`", trainer=flags(fast_dev_run=2)),
    "anomaly": Feature("`detect_anomaly=True`", trainer=flags(detect_anomaly=True, max_epochs=1)),
    "deterministic": Feature(
        "`deterministic=True`",
        trainer=flags(deterministic=True, max_epochs=1),
        # torch fills every buffer that it makes, and by default DeepSpeed's take 800 MB.
        strategy={"reduce_bucket_size": 100_000},
    ),
    "max_steps": Feature("`max_steps=3`", trainer=flags(max_steps=3, max_epochs=-1)),
    "min_steps": Feature(
        "`min_steps=6`, `min_epochs`",
        trainer=with_callback(
            partial(ready.EarlyStopping, "val_loss", mode="max", patience=0), min_steps=6, max_epochs=5
        ),
    ),
    "max_time": Feature("`max_time='00:01:00:00'`", trainer=flags(max_time="00:01:00:00")),
    "sanity": Feature("`num_sanity_val_steps=1`", trainer=flags(num_sanity_val_steps=1)),
    "reload": Feature(
        "`reload_dataloaders_every_n_epochs=1`",
        trainer=flags(reload_dataloaders_every_n_epochs=1),
        module=made_by("OwnData"),
        use=lambda trainer, module: trainer.fit(module),
    ),
    "batchnorm": Feature(
        "`sync_batchnorm=True` with batch norm over tokens, after the blocks",
        trainer=flags(sync_batchnorm=True),
        module=made_by("Normed"),
    ),
    "benchmark": Feature("`benchmark=True`", trainer=flags(benchmark=True, max_epochs=1)),
    "inference": Feature("`inference_mode=False`", trainer=flags(inference_mode=False)),
    "profiler": Feature(
        "`profiler=SimpleProfiler()`",
        trainer=lambda folder: {"profiler": SimpleProfiler(folder, "profile")},
        seen=lambda trainer, module: {
            "times": len(trainer.profiler.recorded_durations["run_training_batch"]),
            **seen_by_default(trainer, module),
        },
    ),
    "every": Feature(
        "`log_every_n_steps=2`", trainer=lambda folder: {**with_csv(folder), "log_every_n_steps": 2}, seen=csv_rows
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
        "`fit(ckpt_path=...)`", trainer=lambda folder: {"max_epochs": 1, "default_root_dir": folder}, use=resume
    ),
    "validate": Feature("`validate` on several dataloaders", use=validate),
    "test": Feature("`test`", use=test),
    "predict": Feature("`predict`", use=predict),
}

HOOKS = {
    "batch_start": Feature("`on_train_batch_start` returning -1", module=made_by("Stops")),
    "clipping": Feature(
        "`configure_gradient_clipping` with `self.clip_gradients`", module=made_by("OwnClipping", kind="norm")
    ),
    "clipping_value": Feature(
        "`configure_gradient_clipping` by value",
        REFUSED,
        "clip_gradients(gradient_clip_algorithm='value')",
        module=made_by("OwnClipping", kind="value"),
    ),
    "before_step": Feature("`on_before_optimizer_step` that leaves `.grad` alone", module=made_by("BeforeStep")),
    "after_backward": Feature(
        "`on_after_backward` that reads `.grad`", REFUSED, "which uses the .grad of", module=made_by("ReadsGradients")
    ),
    "scheduler": Feature("`lr_scheduler_step`, and a scheduler by steps", module=made_by("OwnSchedule")),
    "plateau": Feature("`ReduceLROnPlateau` with `monitor`", trainer=flags(max_epochs=4), module=made_by("Plateau")),
    "optimizer_step": Feature("`optimizer_step` overridden, with its closure", module=made_by("OwnStep")),
    "manual": Feature("Manual optimization, one backward a step", module=made_by("Manual", backwards=1)),
    "manual_late": Feature(
        "A number that manual optimization logs after its backward",
        DIFFERS,
        "each rank logs that of its slice, which a warning says",
        module=made_by("Manual", backwards=1, logs_late=True),
    ),
    "manual_twice": Feature(
        "Manual optimization, two backwards a step",
        REFUSED,
        "backward passes without an optimizer step",
        module=made_by("Manual", backwards=2),
    ),
    "two_optimizers": Feature("Two optimizers", REFUSED, "2 optimizers", module=made_by("TwoOptimizers")),
    "none": Feature("`training_step` returning None", REFUSED, "None from", module=made_by("Returns", kind="none")),
    "mapping": Feature("`training_step` returning a dict", module=made_by("Returns", kind="dict")),
    "iterator": Feature(
        "`training_step(dataloader_iter)`", REFUSED, "training_step(dataloader_iter)", module=made_by("TakesIterator")
    ),
    "epoch_ends": Feature("`on_train_epoch_end`, `on_validation_epoch_end` that log", module=made_by("EpochEnds")),
    "late": Feature("`configure_model`", module=made_by("Late")),
    "own_callbacks": Feature("`configure_callbacks`", trainer=flags(max_epochs=5), module=made_by("OwnCallbacks")),
    "transfer": Feature("`on_after_batch_transfer`, `transfer_batch_to_device`", module=made_by("Transfers")),
    "saving": Feature(
        "`on_save_checkpoint`, `on_load_checkpoint`, `save_hyperparameters`",
        trainer=lambda folder: {"max_epochs": 1, "default_root_dir": folder},
        module=made_by("Saves"),
        use=resume,
        seen=lambda trainer, module: {"kept": module.kept, **seen_by_default(trainer, module)},
    ),
    "edits": Feature("`on_train_batch_end` that edits weights, stages 1 and 2", module=made_by("Edits")),
    "metrics": Feature("A metric of torchmetrics, updated in steps on tokens", module=made_by("Measured")),
    "gathers": Feature(
        "`self.all_gather`",
        DIFFERS,
        "one value for each rank, two of which share a sequence",
        module=made_by("Gathers"),
        seen=lambda trainer, module: {"gathered": module.gathered},
    ),
    "sync_dist": Feature("`self.log(..., sync_dist=True)`", module=made_by("Synced")),
    "nan": Feature(
        "`detect_anomaly=True` and a step that gives NaN",
        trainer=flags(detect_anomaly=True),
        module=made_by("Returns", kind="nan"),
        use=fit_that_raises,
        seen=lambda trainer, module: {},
    ),
}

GROUPS = {"Callbacks": CALLBACKS, "Trainer": FLAGS, "Module hooks": HOOKS}
FEATURES = {name: feature for group in GROUPS.values() for name, feature in group.items()}


def run(rank: int, name: str, folder: str, is_split: bool) -> tuple[dict[str, Tensor], Values, str]:
    """`run_feature` in a worker process, which is sent names only."""
    return run_feature(FEATURES[name], Path(folder), is_split)


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
