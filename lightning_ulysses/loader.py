"""Dataloaders whose ranks agree: on random augmentations, on the optimizer step's targets, and on where to resume."""

from __future__ import annotations

import hashlib
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.loss import WindowPlan


@contextmanager
def _seeded(*parts: object) -> Iterator[None]:
    """Draws random numbers from a stream of its own, named by ``parts``, and leaves the process's streams alone."""
    seed = int.from_bytes(hashlib.blake2s(repr(parts).encode(), digest_size=4).digest(), "little")
    with isolate_rng(include_cuda=False):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed)
        yield


class SeededLoader:
    """Forwards to a dataloader, but loads each batch with random numbers that depend on (seed, name, epoch, index).

    Ranks of one sequence-parallel group pass the same name and see the same augmentations; other ranks see others.

    Args:
        loader: Any dataloader.
        key: What tells streams apart: the run's seed, the data-parallel rank, the stage.
        epoch: The current epoch.
    """

    def __init__(self, loader: Any, key: tuple[object, ...], epoch: Callable[[], int]) -> None:
        self._loader = loader
        self._key = key
        self._epoch = epoch

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_loader" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def _batches(self) -> Iterator[Any]:
        epoch = self._epoch()
        with _seeded(*self._key, epoch, "workers"):
            iterator = iter(self._loader)
        index = 0
        while True:
            with _seeded(*self._key, epoch, index):
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch
            index += 1

    def __iter__(self) -> Iterator[Any]:
        return self._batches()


class TrainLoader(SeededLoader):
    """Looks ahead over one accumulation window, so that its targets are known before the first backward.

    Args:
        loader: Any dataloader.
        key: See `SeededLoader`.
        epoch: The current epoch.
        window: Micro-batches per optimizer step.
        limit: Batches of an epoch that will be used, or None for all.
        count: The targets of a batch, for each tensor that may hold them.
        dp_size: Data-parallel ranks, for resuming on another number of them.
    """

    def __init__(
        self,
        loader: Any,
        key: tuple[object, ...],
        epoch: Callable[[], int],
        *,
        window: int,
        limit: Callable[[], float],
        count: Callable[[Any], Mapping[str, float]],
        dp_size: int,
    ) -> None:
        super().__init__(loader, key, epoch)
        self.plans: deque[WindowPlan] = deque()
        self._window = window
        self._limit = limit
        self._count = count
        self._dp_size = dp_size
        self._consumed = 0
        self._skip = 0

    def advance(self) -> None:
        """Called when a batch is really used; the loop may have fetched further."""
        self._consumed += 1

    def __iter__(self) -> Iterator[Any]:
        skip, self._skip = self._skip, 0
        self.plans.clear()
        self._consumed = skip
        return self._windows(skip)

    def _windows(self, position: int) -> Iterator[Any]:
        source = self._batches()
        for _ in islice(source, position):
            pass
        while True:
            # Windows are counted from the start of the epoch, also behind batches that a resumed run skips.
            size = int(min(self._window - position % self._window, max(1, self._limit() - position)))
            batches = list(islice(source, size))
            if not batches:
                return
            counts = tuple(self._count(batch) for batch in batches) if len(batches) > 1 else ()
            totals: dict[str, float] = {}
            for count in counts:
                for name, value in count.items():
                    totals[name] = totals.get(name, 0.0) + value
            self.plans.append(WindowPlan(len(batches), totals, counts))
            position += len(batches)
            yield from batches

    def state_dict(self) -> dict[str, Any]:
        """Batches used in this epoch; none once the epoch is over."""
        over = self._consumed >= self._limit()
        return {"batches": 0 if over else self._consumed, "dp_size": self._dp_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues behind the batches that were used, also on another number of data-parallel ranks.

        Raises:
            UlyssesError: If the batches used do not divide evenly over the new ranks.
        """
        used = state["batches"] * state["dp_size"]
        if used % self._dp_size:
            raise UlyssesError(
                f"a checkpoint after {state['batches']} batches on {state['dp_size']} data-parallel ranks",
                f"a number of batches that {self._dp_size} ranks share evenly",
                "resume with the former sp_size, or from a checkpoint taken at another step",
            )
        self._skip = used // self._dp_size
        self._consumed = self._skip
