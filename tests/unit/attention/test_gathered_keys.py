"""More ranks than heads: keys and values are gathered, against attention on the whole sequence in one process."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from chunk_steps import MASKS, join_world, numbers, step

from lightning_ulysses.attention import MaskSpec
from lightning_ulysses.attention.attend import Softmax
from lightning_ulysses.attention.chunked import HeadChunks
from lightning_ulysses.attention.explicit import Extras
from lightning_ulysses.geometry.distance import largest
from lightning_ulysses.testing.processes import ProcessPool

HEADS = [(1, 1), (2, 2), (2, 1), (3, 3), (3, 1)]


def sweep(rank: int, size: int) -> dict[str, float]:
    """Each mask with some numbers of heads, and with one of the things that can be added to it."""
    mesh, errors = join_world(rank, size), {}
    fitting = [heads for heads in HEADS if heads[0] < size]
    for number, (name, spec) in enumerate(MASKS.items()):
        for heads in {fitting[number % len(fitting)], fitting[-1 - number % len(fitting)]}:
            errors[f"{name}, {heads}"] = step(mesh, heads, None, spec, 2)
        heads = fitting[(number + size) % len(fitting)]
        per_head = torch.linspace(0.3, 1.2, heads[0], dtype=torch.float64)
        added: dict[str, dict[str, Any]] = {
            "sinks": {"extras": Extras(sinks=per_head.clone().requires_grad_())},
            "bias": {"bias": numbers(3, 1, heads[0], 13, 13).requires_grad_()},
            "softcap": {"extras": Extras(0.7)},
            "again": {"repeats": True},
            "alibi": {"extras": Extras(alibi_slopes=per_head.clone().requires_grad_()), "repeats": True},
            "one bias": {"bias": numbers(4, 2, 1, 13, 13) > -0.5},
        }
        for what in [*added][(number + size) % 3 :: 3]:
            errors[f"{name}, {what}, {heads}"] = step(mesh, heads, None, spec, 2, **added[what])
        errors[f"{name}, chunks, {heads}"] = step(mesh, heads, HeadChunks("auto", overlaps=number % 2 == 0), spec, 2)
    for causal in (False, True):
        errors[f"padded, {causal}"] = step(mesh, HEADS[0], None, MaskSpec(causal, num_padding=2), 2)
        # One token for each rank.
        errors[f"short, {causal}"] = step(mesh, HEADS[0], None, MaskSpec(causal), 1, size)
    return errors


@pytest.mark.parametrize("size", [2, 3, 4])
def test_masks_and_heads(pool: ProcessPool, size: int) -> None:
    for errors in pool.run(sweep, size, world_size=size):
        assert len(errors) > 45 and largest(errors.values()) <= 1e-12, {k: e for k, e in errors.items() if e > 1e-12}


def counted_from_the_first_key(rank: int, size: int) -> float:
    attend = Softmax.attend

    def wrong(self: Softmax, *args: Any) -> torch.Tensor:
        return attend(self, *args[:-1], 0)

    with mock.patch.object(Softmax, "attend", wrong):
        return step(join_world(rank, size), (1, 1), None, MaskSpec(True))


def test_queries_counted_from_the_first_key_are_seen(pool: ProcessPool) -> None:
    """The negative control: a causal mask aligned at the top left."""
    assert max(pool.run(counted_from_the_first_key, 2, world_size=2)) > 1e-2
