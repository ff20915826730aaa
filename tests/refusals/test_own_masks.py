"""Losses that are means over a mask of the user's own: the trial finds the mask, and leaves it as it is."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact import BOUND, refused
from models import HandWritten, pair_batch
from nightly import mostly
from torch import Tensor

from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool


class CompletionMask(HandWritten):
    """A masked mean over a mask of the user's own."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        each = F.cross_entropy(self(batch["input_ids"]).transpose(1, 2), batch["answers"], reduction="none")
        mask = batch["completion_mask"].float()
        return (each * mask).sum() / mask.sum()


MASKS = list(product([torch.int64, torch.bool, torch.float32], [None, "completion_mask"], [False, True]))


@pytest.mark.parametrize(("dtype", "targets", "is_empty"), mostly(MASKS, MASKS[1:3] + MASKS[4:7] + MASKS[8:11]))
def test_a_mask_of_the_users_own_is_found(
    pool: ProcessPool, dtype: torch.dtype, targets: str | None, is_empty: bool
) -> None:
    """Also where it keeps no token of a slice."""
    x, y = pair_batch(1, 33, 2)
    mask = torch.zeros(2, 33)
    mask[0, 3:9], mask[1, 2:11], mask[0, 18:26] = 1, 1, float(not is_empty)
    batch = {"input_ids": x, "answers": y, "completion_mask": mask.to(dtype)}
    strategy = {"sequence_dims": {"answers": 1, "completion_mask": 1}, "targets": targets}
    wanted = fit_single(CompletionMask, [[batch]], lambda batch: float(batch["completion_mask"].sum()))
    for result in fit_split(pool, CompletionMask, [batch], SplitRun(strategy=strategy)):
        assert compare(result, wanted).largest <= BOUND


class SometimesMasked(CompletionMask):
    """Takes the mean over all tokens of a batch without a mask."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step({"completion_mask": torch.ones(batch["answers"].shape), **batch}, batch_idx)


def test_a_step_of_batches_with_and_without_the_mask_is_refused(pool: ProcessPool) -> None:
    batches = []
    for seed in range(2):
        x, y = pair_batch(seed, 33, 2)
        batches.append({"input_ids": x, "answers": y, "completion_mask": (x % 3 == 0).long()})
    del batches[1]["completion_mask"]
    strategy = {"sequence_dims": {"answers": 1, "completion_mask": 1}}
    run = SplitRun(strategy=strategy, trainer={"accumulate_grad_batches": 2})
    for text in pool.run(refused, SometimesMasked, batches, run, world_size=2):
        assert "a batch without 'completion_mask', the targets so far" in text


class Untransferred(CompletionMask):
    """Trains on the very tensors of the dataset, where Lightning would copy them."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch


@pytest.mark.parametrize("targets", [None, "completion_mask"])
def test_the_users_own_mask_stays_as_it_is(pool: ProcessPool, targets: str | None) -> None:
    """One row is cut into views. A target that stands in for those of an empty slice must not reach the dataset."""
    x, y = pair_batch(1, 33, 1)
    mask = torch.zeros(1, 33)
    mask[0, 3:9] = 1
    batch = {"input_ids": x, "answers": y, "completion_mask": mask}
    strategy = {"sequence_dims": {"answers": 1, "completion_mask": 1}, "targets": targets}
    wanted = fit_single(Untransferred, [[batch]] * 2, lambda batch: float(batch["completion_mask"].sum()))
    run = SplitRun(strategy=strategy, trainer={"max_epochs": 2})
    for result in fit_split(pool, Untransferred, [batch], run):
        assert compare(result, wanted).largest <= BOUND
