"""Checkpointed blocks: a step on several processes against one process without checkpoints."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from exact import check
from models import HandWritten, LlamaModule, pair_batch, token_batch

from lightning_ulysses.testing import SplitRun
from lightning_ulysses.testing.processes import ProcessPool

TILED = {"tiled_loss": True, "tiled_mlp": True, "tiled_norm": True, "tile_tokens": 3}
BLOCK: dict[str, Any] = {"checkpoint": "block"}
KEPT: dict[str, Any] = {"checkpoint": "block+attention"}
OFFLOADED: dict[str, Any] = {**KEPT, "offload": "cpu"}


def batches(count: int) -> list[Any]:
    return [token_batch(seed, 33, 2, "uneven") for seed in range(count)]


def run(stage: int, memory: dict[str, Any], **settings: Any) -> SplitRun:
    return SplitRun(strategy={"stage": stage, "memory": memory, **settings})


llama = partial(partial, LlamaModule)

CASES: dict[str, tuple[Any, list[Any], SplitRun, int]] = {
    "block, stage 2": (llama(), batches(1), run(2, BLOCK), 1),
    "attention, stage 2": (llama(), batches(1), run(2, KEPT), 1),
    "attention offloaded, stage 3": (llama(), batches(2), run(3, OFFLOADED), 2),
    "by hand": (partial(HandWritten, kv_heads=2), [pair_batch(1, 33, 2, "uneven")], run(3, OFFLOADED), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_step(pool: ProcessPool, name: str) -> None:
    make, data, settings, steps = CASES[name]
    check(pool, make, data, settings, steps)
