"""Ranks that ask for each other without a collective."""

from __future__ import annotations

import time

import torch.distributed as dist

from lightning_ulysses.testing.processes import ProcessPool
from lightning_ulysses.upstream.meeting import all_arrive, next_meeting, rank_zero_says_it


def meet(rank: int) -> dict[str, object]:
    dist.init_process_group("gloo")
    found: dict[str, object] = {"all": all_arrive("all", 20.0)}
    begin = time.monotonic()
    if rank == 1:
        found["alone"] = all_arrive("alone", 0.3)
        found["seconds"] = time.monotonic() - begin
        dist.barrier()
    else:
        dist.barrier()
        # The other one has given up meanwhile, so this one must not go on as if they had met.
        found["late"] = all_arrive("alone", 5.0)
        found["waited"] = time.monotonic() - begin
    first, second = next_meeting("step"), next_meeting("step")
    found["names"] = (first, second)
    found["arrived"] = all_arrive(second, 20.0)
    # Rank 0 keeps the store.
    dist.barrier()
    return found


def test_a_meeting_is_held_by_all_or_called_off_for_all(pool: ProcessPool) -> None:
    zero, one = pool.run(meet, world_size=2)
    assert zero["all"] and one["all"]
    assert one["alone"] is False and 0.3 <= float(str(one["seconds"])) < 5
    assert zero["late"] is False
    assert zero["names"] == one["names"] == ("step/1", "step/2") and zero["arrived"] and one["arrived"]


def say(rank: int) -> list[bool]:
    dist.init_process_group("gloo")
    same = [rank_zero_says_it(f"occasion {number}", "the same", 20.0) for number in range(2)]
    begin = time.monotonic()
    other = rank_zero_says_it("another", f"on rank {rank}", 20.0)
    waited = time.monotonic() - begin > 10
    alone = rank == 1 and rank_zero_says_it("alone", "the same", 0.3)
    dist.barrier()
    return [*same, other, waited, alone]


def test_a_text_is_said_once(pool: ProcessPool) -> None:
    """Twice over. Where rank 0 has another text, or none, each says its own, and waits only for one that has none."""
    assert pool.run(say, world_size=2) == [[False] * 5, [True, True, False, False, False]]
