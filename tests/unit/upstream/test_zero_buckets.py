"""The order of gradients in buckets, with stand-ins for a GPU's streams and events."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from lightning_ulysses.exchange.turns import BackwardTurns
from lightning_ulysses.upstream.zero_buckets import GradientQueue, _sort


class Stream:
    """A stream that notes in ``log`` what it waits for."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def unsorted_bucket(log: list[str]) -> tuple[Any, Any]:
    """An optimizer and its bucket of two gradients, 0 after 1, whose copies run on a side stream."""
    buffer = torch.tensor([5.0, 6.0, 1.0, 2.0, 3.0])
    bucket = SimpleNamespace(
        params=[(0, 1, 11), (0, 0, 10)],
        grads=[buffer[:2].view(2), buffer[2:].view(3)],
        copy_streams={Stream("side", log)},
        buffer=[buffer],
        index=0,
        elements=5,
    )

    def record(held: Any) -> None:
        log.append(f"event after {held.buffer[0].tolist()}")

    return SimpleNamespace(contiguous_gradients=True, _record_bucket_producer=record), bucket


def test_a_sorted_bucket_is_reduced_only_once_it_is_sorted() -> None:
    log: list[str] = []
    optimizer, bucket = unsorted_bucket(log)
    current = Stream("current", log)
    with mock.patch.object(torch.cuda, "current_stream", return_value=current):
        _sort(optimizer, bucket)
    # DeepSpeed's reduction stream waits for events (with offload) or for `copy_streams`.
    assert log == ["current waits for side", "event after [1.0, 2.0, 3.0, 5.0, 6.0]"]
    assert current in bucket.copy_streams and bucket.params == [(0, 0, 10), (0, 1, 11)]
    assert [grad.tolist() for grad in bucket.grads] == [[1.0, 2.0, 3.0], [5.0, 6.0]]
    log.clear()
    with mock.patch.object(torch.cuda, "current_stream", return_value=current):
        _sort(optimizer, bucket)
    assert not log


def test_the_optimizer_has_what_is_used() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, IPGBucket

    for name in ("_record_bucket_producer", "reduce_independent_p_g_buckets_and_remove_grads", "reduce_ipg_grads"):
        assert callable(getattr(DeepSpeedZeroOptimizer, name))
    bucket = IPGBucket()
    assert bucket.copy_streams == set() and bucket.ready_events == {}


class Buckets:
    """DeepSpeed's rule: a bucket is summed before the parameter that no longer fits."""

    def __init__(self, size: int) -> None:
        self.reduce_bucket_size = size
        self.log: list[Any] = []
        self._held: list[int] = []
        self._elements = 0

    def reduce_independent_p_g_buckets_and_remove_grads(self, param: Any, i: int) -> None:
        if self._elements + param.numel() > self.reduce_bucket_size:
            self.log.append(tuple(self._held))
            self._held, self._elements = [], 0
        self._held.append(param.param_idx_in_group)
        self._elements += param.numel()


def parameters(sizes: list[int]) -> list[Any]:
    made = [nn.Parameter(torch.zeros(size)) for size in sizes]
    for index, parameter in enumerate(made):
        parameter.param_idx_in_group = index  # type: ignore[attr-defined]
    return made


# Gradients between exchanges, as two ranks make them.
ARRIVALS = ([[4, 5], [2, 3], [0, 1]], [[5, 4], [3, 2], [1, 0]])


@pytest.mark.parametrize("sizes", [[50, 30, 50, 30, 50, 30], [60, 41, 60, 41, 60, 41], [10, 90, 20, 80, 100, 30]])
def test_ranks_sum_the_same_between_the_same_exchanges(sizes: list[int]) -> None:
    logs = []
    for arrival in ARRIVALS:
        buckets = Buckets(130)
        queue, turns = GradientQueue(buckets), BackwardTurns()
        turns.calls.append(queue.drain)
        params = parameters(sizes)
        for number, segment in enumerate(arrival):
            for index in segment:
                queue.add(params[index], 0)
            out = torch.zeros(1, requires_grad=True) * 1
            turns.before(out)
            out.sum().backward()
            buckets.log.append(f"exchange {number}")
        logs.append(buckets.log)
    assert logs[0] == logs[1] and any(isinstance(entry, tuple) for entry in logs[0])


def test_not_more_than_a_bucket_waits() -> None:
    buckets = Buckets(100)
    queue = GradientQueue(buckets)
    for parameter in parameters([40, 40, 40, 40]):
        queue.add(parameter, 0)
        assert queue._numbers <= 100
    queue.drain()
    assert buckets.log == [(0, 1)]
