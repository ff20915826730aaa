"""What one rank does for all, with its failure raised on all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from lightning_ulysses.errors import UlyssesError

T = TypeVar("T")
_PATIENCE = timedelta(days=1)


def world() -> Any:
    """The group of all ranks; None for a process by itself."""
    is_alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
    return None if is_alone else dist.group.WORLD


@contextmanager
def patient_group() -> Iterator[Any]:
    """A group of all ranks that waits for a day, and ends at once where a rank has died; None for a single process."""
    if world() is None:
        yield None
        return
    # Gloo also beside NCCL, whose watchdog ends a rank that waits for minutes.
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def on_rank_zero(work: Callable[[], T], group: Any) -> T:
    """The result of a function that runs on rank 0, or its exception, on every rank.

    Args:
        work: The result must be picklable.
        group: From `world` or `patient_group`.
    """
    if group is None:
        return work()
    result: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            result = [work(), None]
        except UlyssesError as error:
            result = [None, error]
        except Exception as error:
            # Some exceptions cannot be sent.
            dist.broadcast_object_list([None, RuntimeError(f"rank 0: {error!r}")], src=0, group=group)
            raise
    dist.broadcast_object_list(result, src=0, group=group)
    if result[1] is not None:
        raise result[1]
    value: T = result[0]
    return value


def from_all(value: T, group: Any) -> list[T]:
    """The value of each rank."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
