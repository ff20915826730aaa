"""Wraps dataloaders so that the ranks of a group see the same batches, and targets are counted ahead.

It also resumes training in the middle of an epoch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from lightning_ulysses.batch.random_streams import named_stream
from lightning_ulysses.batch.trail import Trail
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
        is_last: Returns whether the batch that was used last is the last one of the epoch.
        returns: Whether a resumed epoch goes back to the batch after the last optimizer step.
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
        is_last: Callable[[], bool] = lambda: False,
        returns: bool = False,
        count: Callable[[Any], Mapping[str, float]],
        dp_size: int,
        dp_rank: int = 0,
        most: int | None = None,
        shared: Callable[[int], int] = int,
    ) -> None:
        super().__init__(loader, key, epoch)
        self._most = most
        self._shared = shared
        self.plans: deque[AccumulationWindow] = deque()
        self._window = window
        self._limit = limit
        self._is_last = is_last
        self._returns = returns
        self._count = count
        self._dp_size = dp_size
        self._consumed = 0
        # Batches of the epoch of which the optimizer has stepped.
        self._stepped = 0
        # Batches of the epoch used before the current iteration began, and before the next one will begin.
        self._began = self._began_next = 0
        self._trail = Trail(loader, dp_rank)

    def __len__(self) -> int:
        return len(self._loader) if self._most is None else min(len(self._loader), self._most)

    def advance(self) -> None:
        """Counts a batch that the step uses. The training loop may have fetched more batches than that."""
        self._consumed += 1

    def stepped(self) -> None:
        """Notes that the optimizer has stepped: a resumed run does not use the batches so far again."""
        self._stepped = self._consumed

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
        self._consumed = self._stepped = self._began
        self._trail.begin()
        return self._windows(self._began)

    def _windows(self, position: int) -> Iterator[Any]:
        if self._resumable():
            source = self._batches(position)
        else:
            # Other samplers begin at the start of the epoch: the batches that were used are loaded and discarded.
            source = self._batches()
            for number, batch in enumerate(islice(source, position)):
                self._trail.add(number, batch)
            self._trail.check(position, self._batches)
        while True:
            # Windows count from the start of the epoch, also in a resumed run. The last one of an epoch may be shorter.
            size = int(min(self._window - position % self._window, max(1, self._limit() - position)))
            batches = list(islice(source, size))
            batches = batches[: self._shared(len(batches))]
            if not batches:
                return
            self.plans.append(AccumulationWindow(batches, self._count))
            if not self._resumable():
                for number, batch in enumerate(batches, position):
                    self._trail.add(number, batch)
            position += len(batches)
            yield from batches
            if len(batches) < size:
                # The epoch is over on some rank, which does not come to the next exchange.
                return

    def state_dict(self) -> dict[str, Any]:
        """The number of batches used in this epoch; 0 after the last one.

        Within an accumulation window, it is that of the batches before it: their gradients are not saved.
        """
        is_over = self._consumed >= self._limit() or self._is_last()
        # Not if the step on the last batch failed.
        if is_over and not (self._returns and self._stepped < self._consumed):
            has_length = self._limit() < float("inf")
            return {"batches": 0, "dp_size": self._dp_size, "is_over": True, "has_length": has_length}
        used = self._stepped if self._returns else self._consumed
        state: dict[str, Any] = {"batches": used, "dp_size": self._dp_size, "is_over": False}
        # Of this data-parallel rank. A checkpoint holds those of all.
        state["shares"] = [self._trail.state_dict(used)]
        if resumable := self._resumable():
            sampler, items = resumable
            state["sampler"] = sampler.state_after((used - self._began) * items, items)
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
        elif used:
            self._trail.load_state_dict(state, self._dp_size)
        self._began_next = used // self._dp_size
        self._consumed = self._stepped = self._began = self._began_next
