"""Positions that are more than a count from 0: they jump ahead, restart, or reach beyond what a model was made for."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from exact import BOUND, fit_broken
from models import LlamaModule, count_targets, token_batch
from torch import Tensor

from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool


class Cached(LlamaModule):
    """Like every transformers model as it is made; in one process, a cache keeps it from looking for documents."""

    def __init__(self, is_cached: bool) -> None:
        super().__init__()
        self.model.config.use_cache = is_cached


class Inner(Cached):
    """Calls the model inside of the model, and says itself that there is no cache."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
        hidden = self.model.model(**inputs, use_cache=False).last_hidden_state
        return torch.nn.functional.cross_entropy(self.model.lm_head(hidden).flatten(0, 1), batch["labels"].flatten())


def jumping(padding: int | None) -> dict[str, Tensor]:
    """Two rows whose positions jump ahead at other places, with a mask that leaves so many tokens out."""
    batch = token_batch(3, 33, 2)
    rows = (16, 100), (5, 50)
    places = [torch.cat([torch.arange(end), torch.arange(begin, begin + 33 - end)]) for end, begin in rows]
    batch["position_ids"] = torch.stack(places)
    if padding is not None:
        batch["attention_mask"] = torch.ones(2, 33, dtype=torch.long)
        batch["attention_mask"][0, :padding] = 0
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def count_labels(batch: Any) -> float:
    return float((batch["labels"] != -100).sum())


JUMPS: dict[str, tuple[Any, int | None, Any]] = {
    "mask of ones": (partial(Cached, False), 0, count_targets),
    "padding": (partial(Cached, True), 3, count_targets),
    "cache": (partial(Cached, True), None, count_targets),
    "no cache": (partial(Cached, False), None, count_targets),
    "no cache inside": (partial(Inner, True), None, count_labels),
}


@pytest.mark.parametrize("case", JUMPS)
def test_jumps_ahead_mean_what_they_mean_in_one_process(pool: ProcessPool, case: str) -> None:
    make, padding, count = JUMPS[case]
    batch = jumping(padding)
    wanted = fit_single(make, [[batch]], count)
    for result in fit_split(pool, make, [batch], SplitRun()):
        assert compare(result, wanted).largest <= BOUND, compare(result, wanted)


def never_cached(*args: Any) -> bool:
    return False


def test_jumps_as_documents_are_another_step(pool: ProcessPool) -> None:
    batch, make = jumping(None), partial(Cached, True)
    wanted = fit_single(make, [[batch]], count_targets)
    mechanism = "lightning_ulysses.interceptors.transformers.model_inputs._is_cached"
    for result in pool.run(fit_broken, make, [batch], SplitRun(), mechanism, never_cached, world_size=2):
        assert compare(result, wanted).step > 1e-2
