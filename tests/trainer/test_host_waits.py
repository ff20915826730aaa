"""Where the host would wait for a GPU in a steady step: every read of a tensor's values from our code, counted.

A CPU cannot tell its own memory from a device's. So what reads a batch before it is moved is left out by its module,
and everything else that reads values counts.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from models import LlamaModule, token_batch
from nightly import mostly
from torch.overrides import TorchFunctionMode

import lightning_ulysses
from lightning_ulysses import TokenCountMonitor
from lightning_ulysses.testing import SplitRun, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool

_OURS = str(Path(lightning_ulysses.__file__).parent)
# They read what the dataloader has made, on the host, and keep counts there.
_ON_HOST = (
    *("batch/", "geometry/", "data/", "exchange/agreement.py", "loss/weights.py"),
    *("upstream/zero_buckets.py", "upstream/signals.py"),
)
_READS = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__", "masked_select"}


def _callers(frame: FrameType | None, most: int) -> Iterator[FrameType]:
    while frame is not None and most:
        yield frame
        frame, most = frame.f_back, most - 1


def _reader(frame: FrameType | None) -> str | None:
    """The line of ours that reads values, itself or by torch, or Lightning's that reads what is logged."""
    names = [f.f_code.co_name for f in _callers(frame, 8)]
    if "convert_tensors_to_scalars" in names:
        return "Lightning:logged values"
    while frame is not None and "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None or not frame.f_code.co_filename.startswith(_OURS):
        return None
    name = frame.f_code.co_filename.removeprefix(f"{_OURS}/")
    return None if name.startswith(_ON_HOST) else f"{name}:{frame.f_code.co_name}"


class Waits(TorchFunctionMode):
    """Counts the functions of ours that read values of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READS:
            place = _reader(sys._getframe(1))
            if place is not None:
                self.found[f"{place} {name}"] += 1
        return func(*args, **(kwargs or {}))


class Spy(L.Callback):
    """Counts in the steps after the first three, in which targets, batches and the model are still checked."""

    def __init__(self) -> None:
        self.waits = Waits()
        self.is_on = False

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5 and not self.is_on:
            self.waits.__enter__()
            self.is_on = True

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.is_on:
            self.waits.__exit__(None, None, None)
            self.is_on = False


class Reading(LlamaModule):
    """Control: a step that reads its loss by a function of ours."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        # As if it stood in the package.
        exec(compile("float(loss)", f"{_OURS}/callbacks/control.py", "exec"), {"loss": loss.detach()})
        return loss


def waits(rank: int, make: Any, stage: int, **monitor: Any) -> dict[str, int]:
    """What reads values in four steady micro-batches."""
    from deepspeed.accelerator import get_accelerator

    run = SplitRun(strategy={"stage": stage, "reduce_bucket_size": 12_000}, trainer={"accumulate_grad_batches": 2})
    spy = Spy()
    packed = {"position_ids": torch.arange(33)[None] % 12}
    batches = [{**token_batch(seed, 33), **packed} for seed in range(10)]
    trainer = split_trainer(run, [TokenCountMonitor(report=False, **monitor), spy])
    # An engine of an earlier run waits for the device when it is collected.
    gc.collect()
    with mock.patch.object(get_accelerator(), "synchronize") as synchronize:
        trainer.fit(make(), split_loader(batches, run, rank))
    # DeepSpeed's throughput timer waits for the device, but is off.
    assert not synchronize.called
    return dict(spy.waits.found)


def shown(rank: int) -> dict[str, int]:
    return waits(rank, LlamaModule, 2, prog_bar=True)


@pytest.mark.parametrize("stage", mostly([2, 3], [2]))
def test_no_wait_is_ours_in_a_steady_step(pool: ProcessPool, stage: int) -> None:
    assert pool.run(waits, LlamaModule, stage, world_size=2) == [{}] * 2


def test_values_in_the_progress_bar_are_read_for_each_micro_batch(pool: ProcessPool) -> None:
    for found in pool.run(shown, world_size=2):
        assert found["Lightning:logged values item"] >= 4


def test_a_read_of_the_loss_is_counted(pool: ProcessPool) -> None:
    for found in pool.run(waits, Reading, 2, world_size=2):
        assert found == {"callbacks/control.py:<module> __float__": 4}
