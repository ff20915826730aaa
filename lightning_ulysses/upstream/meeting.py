"""Lets ranks ask for each other without a collective, so that a rank that waits for nobody can stop waiting.

They write to the store through which their process groups were made, which only torch's own modules use otherwise
(torch ``distributed/distributed_c10d.py``).
"""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

from lightning_ulysses.exchange.agreement import digest

# Seconds between two looks: few at first, since ranks mostly come together.
_SHORTEST, _PAUSE = 0.001, 0.05
# More than there are ranks.
_OFF = 2**40


def _store() -> Any:
    return dist.PrefixStore("lightning_ulysses", dist.distributed_c10d._get_default_store())


def next_meeting(name: str) -> str:
    """A name for the next meeting of this kind, the same on all ranks as long as all hold as many."""
    return f"{name}/{_store().add(f'{name}/of/{dist.get_rank()}', 1)}"


def all_arrive(name: str, seconds: float) -> bool:
    """Whether all ranks come within a time, this one included.

    All that ask get the same answer, as long as a collective follows: the store ends with rank 0.

    Args:
        name: Of the meeting; the same on all ranks, and another one for each meeting.
        seconds: How long to wait. A rank that is gone, or waits in a collective, never comes.
    """
    try:
        store, size = _store(), dist.get_world_size()
        count, deadline, pause = int(store.add(name, 1)), time.monotonic() + seconds, _SHORTEST
        while 0 <= count < size and time.monotonic() < deadline:
            time.sleep(pause)
            count, pause = int(store.add(name, 0)), min(2 * pause, _PAUSE)
        if 0 <= count < size:
            # Whoever comes later finds that the meeting was called off. The last rank may just have come.
            count = int(store.add(name, -_OFF)) + _OFF
            if count == size:
                store.add(name, _OFF)
    except RuntimeError:
        # The rank that keeps the store is gone.
        return False
    return count == size


def rank_zero_says_it(name: str, text: str, seconds: float) -> bool:
    """Whether rank 0 has the same text to say, so that this rank need not.

    Rank 0 waits until the others have asked, since the store may end with it.

    Args:
        name: Of the occasion; the same on all ranks, and another one each time.
        text: What this rank would say.
        seconds: How long to wait for ranks that say nothing.

    Returns:
        False on rank 0, and on a rank whose text rank 0 does not have.
    """
    mine, others = str(digest(text)).encode(), dist.get_world_size() - 1
    said, asked = f"{name}/said", f"{name}/asked"
    deadline = time.monotonic() + seconds
    try:
        store = _store()
        if dist.get_rank() == 0:
            store.set(said, mine)
            while int(store.add(asked, 0)) < others and time.monotonic() < deadline:
                time.sleep(_PAUSE)
            return False
        while not store.check([said]):
            if time.monotonic() > deadline:
                return False
            time.sleep(_PAUSE)
        is_same = bytes(store.get(said)) == mine
        store.add(asked, 1)
    except RuntimeError:
        # Rank 0 is gone, and the store with it.
        return False
    return is_same
