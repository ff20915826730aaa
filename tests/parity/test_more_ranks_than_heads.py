"""One optimizer step on more processes than query heads, or on those that the user has gather keys, is that of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact import BOUND, check, fit_broken
from models import count_targets, hand_written, llama, pair_batch, token_batch
from nightly import mostly
from torch import Tensor

from lightning_ulysses import PackingCollator
from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool


def padded(seed: int) -> dict[str, Tensor]:
    batch = token_batch(seed, 33, 2)
    mask = torch.ones(2, 33, dtype=torch.int64)
    mask[0, :7] = 0
    mask[1, 20:] = 0
    return {**batch, "attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}


def manual(seed: int) -> dict[str, Any]:
    return {"sp_size": {"ulysses": 2, "gather": 2}, "stage": seed}


CASES: dict[str, tuple[Any, list[Any], SplitRun]] = {
    "1 on 2": (hand_written(heads=1, kv_heads=1), [pair_batch(1, 33, 2, "uneven")], SplitRun(2, 2, {"stage": 1})),
    "2 on 3, no mask": (hand_written(heads=2, kv_heads=2, attention="full"), [pair_batch(1, 32)], SplitRun(3, 3)),
    "3 on 4, recomputed": (
        llama(heads=3, kv_heads=1),
        [token_batch(1, 33, 1, "uneven")],
        SplitRun(4, 4, {"stage": 3, "memory": {"checkpoint": "block+attention"}}),
    ),
    "1 on 2, two groups, accumulated": (
        llama(heads=1, kv_heads=1),
        [token_batch(seed, 33, 1, "first_half" if seed else "uneven") for seed in range(4)],
        SplitRun(4, 2, {"stage": 2}, {"accumulate_grad_batches": 2}),
    ),
    "2/1 on 3, padding": (llama(heads=2, kv_heads=1), [padded(1)], SplitRun(3, 3, {"stage": 3})),
    "1 on 3, window": (llama(heads=1, kv_heads=1, window=5), [token_batch(1, 31)], SplitRun(3, 3)),
    "8/2 on 2 x 2, chunks": (
        llama(heads=8, kv_heads=2),
        [token_batch(seed, 33, 1, "uneven") for seed in range(2)],
        SplitRun(4, 4, {**manual(2), "memory": {"head_chunks": 4}}, {"accumulate_grad_batches": 2}),
    ),
    # Chunks with which one rank is done with a key/value head, and another one is not.
    "6/3 on 2 x 2, chunks": (
        llama(heads=6, kv_heads=3),
        [token_batch(1, 33, 1, "uneven")],
        SplitRun(4, 4, {**manual(3), "memory": {"head_chunks": 3}}),
    ),
}


SELDOM = ("2 on 3, no mask", "3 on 4, recomputed")


@pytest.mark.parametrize("case", mostly(CASES, SELDOM))
def test_a_step_is_that_of_one_process(pool: ProcessPool, case: str) -> None:
    check(pool, *CASES[case])


def test_packed_documents(pool: ProcessPool) -> None:
    """Against a batch for each document."""
    make, generator = llama(heads=3, kv_heads=1), torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 61, (length,), generator=generator) for length in (12, 1, 9, 12)]
    alone = [{"input_ids": row[None], "labels": row[None]} for row in rows if len(row) > 1]
    wanted = fit_single(make, [alone], count_targets)
    packed: dict[str, Tensor] = PackingCollator()([{"input_ids": row.tolist()} for row in rows])
    for result in fit_split(pool, make, [packed], SplitRun(4, 4)):
        assert compare(result, wanted).largest <= BOUND, compare(result, wanted)


def own_slice(whole: Tensor, dim: int, shares: tuple[int, ...], rank: int, group: Any) -> Tensor:
    return whole.split(shares, dim)[rank].contiguous()


def test_without_the_gradients_of_other_ranks_it_is_wrong(pool: ProcessPool) -> None:
    """The negative control: keys get the gradient of this rank's queries alone."""
    make, batches, run = CASES["1 on 2"]
    wanted = fit_single(make, [batches], count_targets)
    target = "lightning_ulysses.exchange.gathered_keys.sum_slices"
    for result in pool.run(fit_broken, make, batches, run, target, own_slice, world_size=2):
        assert compare(result, wanted).largest > 100 * BOUND
