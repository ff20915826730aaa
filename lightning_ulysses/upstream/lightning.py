"""The private parts of Lightning that this package uses, pinned by a test."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers, _MockOptimizer
from lightning.pytorch.loops.fit_loop import RestartStage
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_ulysses.patching.handle import Handle

if TYPE_CHECKING:
    import lightning.pytorch as pl


def should_accumulate(trainer: pl.Trainer) -> bool:
    """Whether no optimizer step follows this micro-batch (Lightning ``loops/training_epoch_loop.py``)."""
    return bool(trainer.fit_loop._should_accumulate())


def used_batches(trainer: pl.Trainer) -> float:
    """Batches of a training epoch that the loop will use; infinite if unknown."""
    loader = trainer.fit_loop._combined_loader
    if loader is None:
        return float("inf")
    limit = loader.limits[0] if loader.limits else None
    return float("inf") if limit is None else float(limit)


def evaluation_batches(trainer: pl.Trainer) -> list[float]:
    """Batches of the evaluation that begins, for each dataloader; infinite if unknown."""
    batches: Any = trainer._active_loop.max_batches  # type: ignore[union-attr]
    return [float(count) for count in (batches if isinstance(batches, list) else [batches])]


def forget_train_loader(trainer: pl.Trainer) -> None:
    """Makes the loop set up the train dataloader again, after the checkpoint's loop state has been loaded.

    A scheduler that reads ``trainer.estimated_stepping_batches`` makes Lightning set it up earlier. Then a resumed run
    would start the epoch from its first batch (``FitLoop.setup_data``).
    """
    trainer.fit_loop._combined_loader = None


def progress(trainer: pl.Trainer) -> dict[str, Any]:
    """What the loops alone know of a run's `Clock` (``loops/progress.py``).

    Returns:
        ``epoch``, which is right also when a resumed run sets up its data, unlike ``current_epoch``; and ``is_last``.
    """
    current: Any = trainer.fit_loop.epoch_progress.current
    return {"epoch": int(current.processed), "is_last": bool(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)}


def begin_new_epoch(trainer: pl.Trainer) -> None:
    """Has a run that is resumed where an epoch ended begin the next one as one that is begun.

    Lightning goes on as within an epoch: it neither counts the next one nor calls ``on_train_epoch_start``. Its counts
    are then wrong up to the end, and a run that is resumed from the end of a later epoch repeats that epoch's batches
    (``loops/fit_loop.py``, ``on_advance_start``).
    """
    loop = trainer.fit_loop
    total: Any = loop.epoch_progress.total
    if total.processed == total.started and loop.restarted_mid_epoch:
        loop._restart_stage = RestartStage.NONE


# Counters of batches; a checkpoint taken after a batch does not have it in "completed" yet.
_COUNTS = ("ready", "started", "processed")


def loader_state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What the train dataloader has saved in a checkpoint, see ``TrainLoader.state_dict``; empty if nothing."""
    fit_loop = checkpoint.get("loops", {}).get("fit_loop", {})
    state: dict[str, Any] = (fit_loop.get("state_dict", {}).get("combined_loader") or [{}])[0]
    return state


def settle_progress(checkpoint: dict[str, Any], dp_size: int, is_iteration_based: bool) -> None:
    """Has the loops go on at the place that the train dataloader has saved.

    A checkpoint within an accumulation window goes back to the window's first batch. The epoch of a dataset without
    length is over, which Lightning does not see, nor in a run that ends by ``max_steps`` (``loops/fit_loop.py``,
    ``loops/training_epoch_loop.py``).

    Args:
        checkpoint: Changed in place.
        dp_size: Data-parallel ranks now.
        is_iteration_based: Whether the run that resumes ends by ``max_steps``.
    """
    fit_loop = checkpoint.get("loops", {}).get("fit_loop", {})
    state = loader_state(checkpoint)
    if "is_over" in state:
        progress, epoch = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_progress"]["current"]
        is_within = epoch["processed"] < epoch["started"]
        current = progress["current"]
        if is_within and not state["is_over"] and any(current[name] != state["batches"] for name in _COUNTS):
            _return_to(fit_loop, state["batches"])
        elif is_within and not state.get("has_length", True) and current["completed"] < current["processed"]:
            _end_epoch(fit_loop, is_iteration_based)
        elif is_iteration_based and state["is_over"] and epoch["completed"] < epoch["processed"] == epoch["started"]:
            # Lightning would run an epoch without batches first, and count it.
            _end_epoch(fit_loop, is_iteration_based)
    rescale_progress(checkpoint, dp_size)


def _return_to(fit_loop: dict[str, Any], used: int) -> None:
    """Sets the number of batches of the epoch, as after a batch that is not in ``completed`` yet.

    Lightning adds that one when it resumes, and a step of the loggers with it.
    """
    progress = fit_loop["epoch_loop.batch_progress"]
    current, total = progress["current"], progress["total"]
    before = total["ready"] - current["ready"]
    for name in _COUNTS:
        current[name], total[name] = used, before + used
    current["completed"], total["completed"] = used - 1, before + used - 1
    progress["is_last_batch"] = False
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    # An evaluation within the window will run again.
    evaluation = fit_loop["epoch_loop.val_loop.batch_progress"]["total"]
    evaluation["processed"] = evaluation["completed"] = evaluation["started"]


def _end_epoch(fit_loop: dict[str, Any], is_iteration_based: bool) -> None:
    """Ends the epoch, as Lightning does after the last batch of a dataset whose length it knows."""
    progress = fit_loop["epoch_loop.batch_progress"]
    for counts in fit_loop["epoch_progress"].values():
        counts.update(dict.fromkeys((*_COUNTS, "completed"), counts["started"]))
    progress["is_last_batch"] = False
    progress["current"].update(dict.fromkeys((*_COUNTS, "completed"), 0))
    total, others = progress["total"], fit_loop["epoch_loop.state_dict"]
    if is_iteration_based and total["completed"] == total["processed"]:
        # As if the last batch were pending: otherwise Lightning skips what it takes for an evaluation.
        total["completed"] -= 1
        others["_batches_that_stepped"] -= 1
    if is_iteration_based:
        # Lightning adds the pending batch, since it takes this for a restart within an epoch.
        progress["current"]["completed"] = -1
    else:
        total["completed"] = total["processed"]
        others["_batches_that_stepped"] += 1


def rescale_progress(checkpoint: dict[str, Any], dp_size: int) -> None:
    """Converts the batch count of an unfinished epoch to this number of data-parallel ranks (``loops/progress.py``).

    The dataloader's own state, ``TrainLoader.state_dict``, holds the number of ranks so far.
    """
    fit_loop = checkpoint.get("loops", {}).get("fit_loop", {})
    former = loader_state(checkpoint).get("dp_size", dp_size)
    if former != dp_size:
        current = fit_loop["epoch_loop.batch_progress"]["current"]
        # A checkpoint taken after a batch does not have it in "completed" yet. Lightning adds it when it resumes.
        pending = current["processed"] - current["completed"]
        for name in ("ready", "started", "processed"):
            current[name] = current[name] * former // dp_size
        current["completed"] = current["processed"] - pending


def hooks_change_batches(trainer: pl.Trainer) -> bool:
    """Whether the user's hooks see each batch on its way to the device (``trainer/connectors/data_connector.py``)."""
    hooks = ("transfer_batch_to_device", "on_after_batch_transfer")
    owners = (trainer.lightning_module, getattr(trainer, "datamodule", None))
    return any(owner is not None and is_overridden(hook, owner) for hook in hooks for owner in owners)


def transfers(
    trainer: pl.Trainer, hooked: Callable[[Any], Any], device: torch.device
) -> tuple[Callable[[Any], Any], Callable[[Any], Any] | None]:
    """How a slice of a batch is moved to the device, and what the user's hooks make of the whole batch before.

    Args:
        trainer: The Trainer.
        hooked: Moves a batch to the device and runs the user's hooks on it.
        device: The device.
    """
    if not hooks_change_batches(trainer):
        return hooked, None
    host = torch.device("cpu")
    # The hooks mean whole sequences.
    return partial(move_data_to_device, device=device), lambda batch: move_data_to_device(hooked(batch), host)


def optimizers_of(module: pl.LightningModule) -> tuple[list[Any], list[Any]]:
    """What ``configure_optimizers`` returns, as lists; no optimizer if it returns None (``core/optimizer.py``)."""
    optimizers, schedulers = _init_optimizers_and_lr_schedulers(module)
    return [each for each in optimizers if not isinstance(each, _MockOptimizer)], schedulers


def set_device_mesh(module: pl.LightningModule, mesh: torch.distributed.device_mesh.DeviceMesh | None) -> None:
    """Sets ``LightningModule.device_mesh``, as Lightning's ModelParallelStrategy does."""
    module._device_mesh = mesh


def before_monitoring(trainer: pl.Trainer, check: Callable[[str, str, Any], None]) -> Handle:
    """Calls a function whenever a run is about to act by a monitored value, on every rank.

    ``ModelCheckpoint`` and ``EarlyStopping`` act by one, and ``ReduceLROnPlateau`` (``callbacks/model_checkpoint.py``,
    ``callbacks/early_stopping.py``, ``loops/training_epoch_loop.py``).

    Args:
        trainer: The Trainer.
        check: Is given the name of what acts, the name of the value, and the value; None if it is missing.
    """
    handle, loop = Handle(), trainer.fit_loop.epoch_loop

    def guard(owner: Any, method: str, kind: str, monitor: str | None) -> None:
        original = getattr(owner, method)

        @functools.wraps(original)
        def guarded(*args: Any) -> Any:
            # A rank that failed is alone.
            if not trainer.interrupted:
                name = str(args[0] if monitor is None else monitor)
                check(kind, name, trainer.callback_metrics.get(name))
            return original(*args)

        vars(owner)[method] = guarded
        handle.add(lambda: vars(owner).pop(method, None) and None)

    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        kind, monitor = type(callback).__name__, getattr(callback, "monitor", None)
        if isinstance(callback, ModelCheckpoint) and monitor not in (None, "epoch", "step"):
            guard(callback, "_monitor_candidates", kind, monitor)
        elif isinstance(callback, EarlyStopping):
            guard(callback, "_run_early_stopping_check", kind, monitor)
    guard(loop, "_get_monitor_value", "ReduceLROnPlateau", None)
    return handle


class OwnsWindows:
    """Mixin for a strategy on DeepSpeed: Lightning decides where an accumulation window ends.

    So the last window of an epoch, which may be shorter, is stepped as well.
    """

    @property
    def handles_gradient_accumulation(self) -> bool:
        """False: DeepSpeed's own count goes on across epochs."""
        return False

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Nothing to block: the engine reduces or accumulates by the boundary it has been told."""
        yield


class AcceptsCompiled:
    """Mixin for a strategy: accepts a LightningModule that was compiled as a whole.

    Lightning checks the class of the strategy, and refuses every one on DeepSpeed (``utilities/compile.py``).
    """

    _compiler_ctx: tuple[pl.LightningModule, dict[str, Any]] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Takes note of a module's compiler settings, and hides them as long as the strategy holds the module."""
        super().__setattr__(name, value)
        # Assigned by the Trainer itself, and not by a method that could be overridden.
        context = getattr(value, "_compiler_ctx", None) if name == "_lightning_module" else None
        if context is not None:
            self._compiler_ctx, value._compiler_ctx = (value, context), None

    def teardown(self) -> None:
        """Gives the module its compiler context back."""
        super().teardown()  # type: ignore[misc]
        if self._compiler_ctx is not None:
            module, context = self._compiler_ctx
            module._compiler_ctx, self._compiler_ctx = context, None


class IndexedDevice:
    """Mixin for a strategy: its device has an index, by which DeepSpeed tells processes apart.

    A second parent of another launcher may name a CPU without one, as ``RayDeepSpeedStrategy`` of Ray 2.60 does.
    """

    local_rank: int

    @property
    def root_device(self) -> torch.device:
        """The device of this process."""
        device: torch.device = super().root_device  # type: ignore[misc]
        return torch.device(device.type, self.local_rank) if device.index is None else device
