"""What is carried into the optimizer's copy of the weights, and what is not."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from lightning_ulysses.upstream import zero_masters
from lightning_ulysses.upstream.zero_masters import MasterCopy


def test_only_edited_weights_lose_digits() -> None:
    master = torch.randn(50, generator=torch.Generator().manual_seed(0))
    live = master.bfloat16()
    before = master.clone()
    assert not torch.equal(before.bfloat16().float(), before)
    optimizer = SimpleNamespace(fp16_partitioned_groups_flat=[live], fp32_partitioned_groups_flat=[master])
    masters = MasterCopy(optimizer)
    zero_masters._CHUNK, chunk = 7, zero_masters._CHUNK
    try:
        masters.carry_edits()
        assert torch.equal(master, before)
        live[13] = 3.0
        live[48] = float("nan")
        masters.carry_edits()
    finally:
        zero_masters._CHUNK = chunk
    kept = [index for index in range(50) if index not in (13, 48)]
    assert torch.equal(master[kept], before[kept]) and master[13] == 3.0 and master[48].isnan()


def test_one_and_the_same_tensor_or_one_on_a_disk_is_left_alone() -> None:
    shared, away = torch.ones(4), torch.ones(4)
    optimizer = SimpleNamespace(
        fp16_partitioned_groups_flat=[shared, away, None], fp32_partitioned_groups_flat=[shared, torch.empty(0), None]
    )
    MasterCopy(optimizer).carry_edits()
    assert shared.equal(torch.ones(4))
    MasterCopy(None).carry_edits()
