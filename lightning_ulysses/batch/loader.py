"""Wraps dataloaders so that the ranks of a group see the same batches, and targets are counted ahead.

It also resumes training in the middle of an epoch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from lightning_ulysses.batch.random_streams import named_stream
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.loss.accumulation import AccumulationWindow


class SeededLoader:
    """Wraps a dataloader. Each batch is loaded with random numbers that depend only on (key, epoch, index).

    Ranks of one sequence-parallel group pass the same key and get the same augmentations. Other groups get different
    ones.

    Args:
        loader: Any dataloader.
        key: Names the random stream: the run's seed, the data-parallel rank and the stage.
        epoch: Returns the current epoch.
    """

    def __init__(self, loader: Any, key: tuple[object, ...], epoch: Callable[[], int]) -> None:
        self._loader = loader
        self._key = key
        self._epoch = epoch

    def __getattr__(self, name: str) -> Any:
        # copy and pickle ask for names before __init__ has run: the lookup of `_loader` would recurse forever.
        if name.startswith("__") or "_loader" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def _batches(self, first: int = 0) -> Iterator[Any]:
        """The batches of the loader. The first of them is number ``first`` of the epoch."""
        epoch = self._epoch()
        # Lightning calls set_epoch of samplers, but not of datasets.
        set_epoch = getattr(getattr(self._loader, "dataset", None), "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
        # The iterator draws the base seed of the worker processes when it is made.
        with named_stream(*self._key, epoch, "workers"):
            iterator = iter(self._loader)
        index = first
        while True:
            # Without workers, augmentations draw here, in this process.
            with named_stream(*self._key, epoch, index):
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch
            index += 1

    def __iter__(self) -> Iterator[Any]:
        return self._batches()


class TrainLoader(SeededLoader):
    """Loads all batches of an accumulation window ahead, so that its targets are known before the first backward.

    Args:
        loader: Any dataloader.
        key: See `SeededLoader`.
        epoch: Returns the current epoch.
        window: Micro-batches of an optimizer step.
        limit: Returns the number of batches of an epoch that will be used; infinite if unknown.
        count: Counts the targets of a batch, for each tensor that may hold them.
        dp_size: Data-parallel ranks. Saved, to resume on another number of them.
        most: Batches of an epoch that all ranks have, where some rank has more; else None.
        shared: Given the number of micro-batches that were loaded for a window, returns how many all ranks have.
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
        most: int | None = None,
        shared: Callable[[int], int] = int,
    ) -> None:
        super().__init__(loader, key, epoch)
        self._most = most
        self._shared = shared
        self.plans: deque[AccumulationWindow] = deque()
        self._window = window
        self._limit = limit
        self._count = count
        self._dp_size = dp_size
        self._consumed = 0
        # Batches of the epoch used before the current iteration began, and before the next one will begin.
        self._began = self._began_next = 0

    def __len__(self) -> int:
        return len(self._loader) if self._most is None else min(len(self._loader), self._most)

    def advance(self) -> None:
        """Counts a batch that the step uses. The training loop may have fetched more batches than that."""
        self._consumed += 1

    def _resumable(self) -> tuple[Any, int] | None:
        """A sampler that can resume in the middle of an epoch, with its items per batch; None if there is none."""
        for name, items in (("batch_sampler", 1), ("sampler", getattr(self._loader, "batch_size", None) or 1)):
            sampler = getattr(self._loader, name, None)
            if hasattr(sampler, "state_after"):
                return sampler, items
        return None

    def __iter__(self) -> Iterator[Any]:
        # Only the first iteration after `load_state_dict` begins in the middle of an epoch.
        self._began, self._began_next = self._began_next, 0
        self.plans.clear()
        self._consumed = self._began
        return self._windows(self._began)

    def _windows(self, position: int) -> Iterator[Any]:
        if self._resumable():
            source = self._batches(position)
        else:
            # Other samplers begin at the start of the epoch: the batches that were used are loaded and discarded.
            source = self._batches()
            for _ in islice(source, position):
                pass
        while True:
            # Windows count from the start of the epoch, also in a resumed run. The last one of an epoch may be shorter.
            size = int(min(self._window - position % self._window, max(1, self._limit() - position)))
            batches = list(islice(source, size))
            batches = batches[: self._shared(len(batches))]
            if not batches:
                return
            self.plans.append(AccumulationWindow(batches, self._count))
            position += len(batches)
            yield from batches
            if len(batches) < size:
                # The epoch is over on some rank, which does not come to the next exchange.
                return

    def state_dict(self) -> dict[str, Any]:
        """The number of batches used in this epoch; 0 after the last one."""
        if self._consumed >= self._limit():
            return {"batches": 0, "dp_size": self._dp_size}
        state: dict[str, Any] = {"batches": self._consumed, "dp_size": self._dp_size}
        if resumable := self._resumable():
            sampler, items = resumable
            state["sampler"] = sampler.state_after((self._consumed - self._began) * items, items)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the batches that were used, also on another number of data-parallel ranks.

        Raises:
            UlyssesError: If the batches used do not divide evenly over the new ranks, or the sampler refuses.
        """
        # Counted over all data-parallel ranks, since their number may have changed.
        used = state["batches"] * state["dp_size"]
        resumable = self._resumable()
        if resumable and used:
            sampler, items = resumable
            saved = state.get("sampler", {})
            if saved.get("items") != items:
                raise UlyssesError(
                    f"a checkpoint in the middle of an epoch of {saved.get('items', 'no')} packs a batch",
                    f"one of a run with a {type(sampler).__name__} and {items} packs a batch",
                    "resume with the former dataloader, or from a checkpoint taken at the end of an epoch",
                )
            sampler.load_state_dict(saved)
        elif used % self._dp_size:
            raise UlyssesError(
                f"a checkpoint after {state['batches']} batches on {state['dp_size']} data-parallel ranks",
                f"a number of batches that {self._dp_size} ranks share evenly",
                "resume with the former sp_size, or from a checkpoint taken at another step",
            )
        self._began_next = used // self._dp_size
        self._consumed = self._began = self._began_next
