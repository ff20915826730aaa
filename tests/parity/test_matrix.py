"""One optimizer step of every pair of settings that the strategy has to get right together."""

from __future__ import annotations

from itertools import combinations, product
from typing import NamedTuple

import pytest
from exact import check
from models import llama, token_batch
from nightly import sampled

from lightning_ulysses.testing import SplitRun
from lightning_ulysses.testing.processes import ProcessPool


class Setting(NamedTuple):
    """``world`` is the number of processes and P, ``heads`` is H and H_kv."""

    stage: int
    world: tuple[int, int]
    accumulate: int
    labels: str
    seq_len: int
    heads: tuple[int, int]


CHOICES = (
    (1, 2, 3),
    ((2, 1), (2, 2), (3, 3), (4, 2), (4, 4)),
    (1, 3),
    ("even", "uneven", "first_half"),
    (32, 33),
    ((4, 2), (3, 1), (5, 5), (9, 3), (8, 2), (4, 1)),
)

MATRIX = [
    Setting(1, (2, 1), 1, "first_half", 32, (9, 3)),
    Setting(1, (2, 1), 3, "even", 33, (4, 2)),
    Setting(2, (2, 1), 3, "uneven", 33, (3, 1)),
    Setting(2, (2, 1), 1, "even", 32, (5, 5)),
    Setting(3, (2, 1), 1, "uneven", 32, (4, 1)),
    Setting(1, (2, 2), 1, "first_half", 32, (3, 1)),
    Setting(1, (2, 2), 3, "even", 33, (4, 1)),
    Setting(2, (2, 2), 3, "even", 32, (5, 5)),
    Setting(3, (2, 2), 3, "uneven", 33, (9, 3)),
    Setting(3, (2, 2), 3, "uneven", 33, (4, 2)),
    Setting(1, (3, 3), 1, "uneven", 33, (5, 5)),
    Setting(1, (3, 3), 3, "uneven", 32, (3, 1)),
    Setting(2, (3, 3), 3, "even", 32, (9, 3)),
    Setting(2, (3, 3), 3, "first_half", 32, (4, 1)),
    Setting(3, (3, 3), 3, "first_half", 33, (4, 2)),
    Setting(1, (4, 2), 1, "even", 33, (4, 1)),
    Setting(2, (4, 2), 1, "uneven", 32, (4, 2)),
    Setting(2, (4, 2), 3, "first_half", 33, (9, 3)),
    Setting(3, (4, 2), 3, "even", 32, (3, 1)),
    Setting(3, (4, 2), 1, "first_half", 32, (5, 5)),
    Setting(1, (4, 4), 3, "even", 33, (8, 2)),
    Setting(1, (4, 4), 1, "uneven", 33, (9, 3)),
    Setting(2, (4, 4), 3, "first_half", 33, (4, 1)),
    Setting(2, (4, 4), 3, "first_half", 33, (8, 2)),
    Setting(2, (4, 4), 1, "uneven", 32, (4, 2)),
    Setting(2, (4, 4), 1, "first_half", 32, (5, 5)),
    Setting(3, (4, 4), 1, "uneven", 32, (8, 2)),
]


def makes_sense(setting: Setting) -> bool:
    """P up to the number of heads; 8/2 is there for more ranks than key/value heads."""
    sp, (heads, kv_heads) = setting.world[1], setting.heads
    return sp <= heads and ((heads, kv_heads) != (8, 2) or sp == 4)


def pairs_of(settings: list[Setting]) -> set[tuple[tuple[int, object], ...]]:
    return {pair for setting in settings for pair in combinations(enumerate(setting), 2)}


def test_every_pair_of_settings_is_there() -> None:
    wanted = pairs_of([setting for setting in map(Setting._make, product(*CHOICES)) if makes_sense(setting)])
    assert len(wanted) > 150 and wanted == pairs_of(MATRIX)


@pytest.mark.parametrize("setting", sampled(MATRIX, 3), ids=str)
def test_one_step(pool: ProcessPool, setting: Setting) -> None:
    world, sp = setting.world
    batches = [
        token_batch(seed, setting.seq_len, 2, setting.labels) for seed in range(setting.accumulate * world // sp)
    ]
    run = SplitRun(world, sp, {"stage": setting.stage}, {"accumulate_grad_batches": setting.accumulate})
    check(pool, llama(heads=setting.heads[0], kv_heads=setting.heads[1]), batches, run)
