"""Reads an iterable source completely, in the same order on every rank and worker."""

from __future__ import annotations

import copy
import random
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
import torch.utils.data._utils.worker as torch_worker

from lightning_ulysses.errors import UlyssesError

_MOST_AHEAD, _SECONDS_AHEAD = 16, 0.005

Source = Iterable[Any] | Callable[[], Iterable[Any]]


def check_source(source: Any) -> None:
    """Refuses a source that can be read only once, or that yields only a part of the documents.

    Raises:
        UlyssesError: With the change to make.
    """
    # A streaming dataset may be an iterator that starts again. Iterators of these modules never do.
    if isinstance(source, Iterator) and type(source).__module__ in ("builtins", "itertools", "_io"):
        raise UlyssesError(
            f"a source of type {type(source).__name__}, which can be read only once",
            "a source that every epoch and every worker can read from its start",
            "pass the generator function itself, without calling it, or an object with __iter__",
        )
    if not isinstance(source, Iterable) and not callable(source):
        raise UlyssesError(
            f"a source of type {type(source).__name__}",
            "an iterable of rows, or a function that returns one",
            "pass a generator function, a streaming dataset, or a list",
        )
    if getattr(source, "_distributed", None) is not None:
        raise UlyssesError(
            "a streaming dataset that is split over ranks (split_dataset_by_node)",
            "the whole dataset on every rank, since packs are dealt to ranks after packing",
            "leave split_dataset_by_node out",
        )


def _whole(source: Any) -> Any:
    """The source, kept from splitting itself over the ranks of the run, as litdata's streaming dataset does."""
    environment: Any = getattr(source, "distributed_env", None)
    if environment is None or environment.world_size == 1:
        return source
    alone = copy.copy(source)
    alone.distributed_env = type(environment)(world_size=1, global_rank=0, num_nodes=1)
    return alone


class _OwnRandom:
    """Gives the global generators a state of its own inside a ``with`` block, and restores theirs afterwards.

    The state depends only on a seed and on how many numbers were drawn in earlier blocks. Sources shuffle with the
    global generators, and ranks and workers seed those differently.
    """

    def __init__(self, seed: int) -> None:
        self._inside: tuple[Any, ...] | None = None
        self._seed = seed

    def __enter__(self) -> None:
        self._outside = _random_states()
        if self._inside is not None:
            _set_random_states(self._inside)
            return
        torch.default_generator.manual_seed(self._seed)
        random.seed(self._seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(self._seed % 2**32)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._inside = _random_states()
        _set_random_states(self._outside)


def _random_states() -> tuple[Any, ...]:
    numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
    return torch.get_rng_state(), random.getstate(), numpy


def _set_random_states(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    if states[2] is not None:
        sys.modules["numpy"].random.set_state(states[2])


class _NoWorker:
    """Hides that this is a dataloader worker: a streaming dataset would read only that worker's part of the data."""

    def __enter__(self) -> None:
        self._info = torch_worker._worker_info
        torch_worker._worker_info = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        torch_worker._worker_info = self._info


def read_whole(source: Source, epoch: int, seed: int) -> Iterator[Any]:
    """Every row of ``source``, as a program with one process would read it.

    All ranks and workers see the same rows in the same order. This also holds if the source shuffles with the global
    random generators, or splits itself over dataloader workers or ranks.

    Args:
        source: See `check_source`.
        epoch: Passed to the source's ``set_epoch`` if it has one, and mixed into the seed.
        seed: Seed of the random numbers that the source draws.
    """
    own, worker = _OwnRandom(seed * 1_000_003 + epoch), _NoWorker()
    with worker, own:
        if hasattr(source, "set_epoch"):
            source.set_epoch(epoch)
        rows = iter(_whole(source if isinstance(source, Iterable) else source()))
    is_over = False
    while not is_over:
        some, is_over = _read_some(rows, worker, own)
        yield from some


def _read_some(rows: Iterator[Any], worker: _NoWorker, own: _OwnRandom) -> tuple[list[Any], bool]:
    """Reads several rows at once if they come quickly: switching the random states takes a quarter of a millisecond.

    Returns:
        The rows, and whether they were the last. The caller must not ask again: litdata's iterator would start anew.
    """
    some: list[Any] = []
    begin = time.perf_counter()
    with worker, own:
        while len(some) < _MOST_AHEAD and time.perf_counter() - begin <= _SECONDS_AHEAD:
            try:
                some.append(next(rows))
            except StopIteration:
                return some, True
    return some, False


def fingerprint(row: Any, before: int) -> int:
    """Continues a checksum of the rows read so far with one row's length, first and last token."""
    tokens = row.get("input_ids", ()) if isinstance(row, Mapping) else row
    mark = (len(tokens), int(tokens[0]), int(tokens[-1])) if len(tokens) else ()
    return zlib.crc32(repr(mark).encode(), before)
