"""``memory="auto"``: the step is that of one process, and less memory has more parts on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import lightning as L
import pytest
from exact import BOUND
from models import LlamaModule, count_targets, token_batch
from torch import Tensor

from lightning_ulysses.planning import auto
from lightning_ulysses.planning.auto import AutoMemory, Found, Room
from lightning_ulysses.testing import SplitRun, compare, fit_rank, fit_single
from lightning_ulysses.testing.processes import ProcessPool

SEED = 5
PLENTY = 2**40


class Llama(LlamaModule):
    """Three blocks."""

    def __init__(self) -> None:
        super().__init__(layers=3)


class Reading(LlamaModule):
    """Its step asks for a value, which only the step itself can tell."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss if float(loss.detach()) > -1 else loss * 2


def batches(count: int) -> list[Any]:
    return [token_batch(seed, 64 * (1 + seed), 2, "uneven") for seed in range(count)]


def run(stage: int, sp_size: int = 2, **settings: Any) -> SplitRun:
    return SplitRun(2, sp_size, {"stage": stage, "memory": "auto", **settings})


@contextmanager
def choices(device: int, host: int = PLENTY) -> Iterator[list[Found]]:
    """What is chosen where so many bytes are free."""
    found: list[Found] = []
    original = AutoMemory._install

    def install(self: AutoMemory, each: Found, *args: Any) -> None:
        found.append(each)
        original(self, each, *args)

    with (
        mock.patch.object(auto, "find_room", return_value=Room(device, host)),
        # The states of a model this small are no part of what is tested.
        mock.patch.object(auto, "state_bytes", return_value=mock.Mock(device={})),
        mock.patch.object(AutoMemory, "_install", install),
    ):
        yield found


def fit(rank: int, make: Any, data: list[Any], settings: SplitRun, device: int) -> Any:
    L.seed_everything(SEED, verbose=False)
    with choices(device) as found, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fit_rank(rank, make, data, settings)
    return result, found, [str(each.message) for each in caught if "memory='auto'" in str(each.message)]


def check(pool: ProcessPool, make: Any, data: list[Any], settings: SplitRun, device: int) -> Any:
    wanted = fit_single(make, [[batch] for batch in data], count_targets, seed=SEED)
    found = pool.run(fit, make, data, settings, device, world_size=2)
    assert all(compare(result, wanted).largest <= BOUND for result, *_ in found)
    assert [each[1] for each in found] == [found[0][1]] * 2
    return found[0][1:]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_step(pool: ProcessPool, stage: int) -> None:
    # Nothing fits, so that all parts are on.
    chosen, said = check(pool, Llama, batches(1), run(stage), 1000)
    assert chosen[0].memory.checkpoint == "block" and chosen[0].memory.tiled_loss and not chosen[0].reason
    assert "more than there is" in said[0]


def test_less_memory_has_more_parts_on(pool: ProcessPool) -> None:
    ((plain,), said) = check(pool, Llama, batches(1), run(2), PLENTY)
    assert not plain.memory.is_on and not said
    ((less,), said) = check(pool, Llama, batches(1), run(2), plain.device - 1)
    assert less.memory.is_on and less.device < plain.device and not said
    ((least,), said) = check(pool, Llama, batches(1), run(2), less.device - 1)
    assert least.device < less.device or "more than there is" in said[0]


def test_a_longer_batch_is_looked_at_again(pool: ProcessPool) -> None:
    ((first, *_), _) = check(pool, Llama, batches(1), run(2), PLENTY)
    chosen, _ = check(pool, Llama, batches(2), run(2), first.device + 1000)
    assert [each.memory.is_on for each in chosen] == [False, True]


def test_split_inside(pool: ProcessPool) -> None:
    chosen, _ = check(pool, Llama, batches(1), run(3, split="blocks"), 1000)
    assert not chosen[0].reason


def test_a_step_that_reads_values_has_all_parts_on(pool: ProcessPool) -> None:
    chosen, said = check(pool, Reading, batches(1), run(2), PLENTY)
    assert chosen[0].reason and chosen[0].memory.checkpoint == "block"
    assert "could not be rehearsed" in said[0]
