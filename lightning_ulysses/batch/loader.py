"""Dataloaders whose ranks agree: on random augmentations, on the optimizer step's targets, and on where to resume."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from lightning_ulysses.batch.random_streams import named_stream
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.loss.accumulation import AccumulationWindow


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

    def _batches(self, first: int = 0) -> Iterator[Any]:
        """The loader's batches, of which the first one is number ``first`` of the epoch."""
        epoch = self._epoch()
        # Lightning tells samplers the epoch, but not datasets.
        set_epoch = getattr(getattr(self._loader, "dataset", None), "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
        with named_stream(*self._key, epoch, "workers"):
            iterator = iter(self._loader)
        index = first
        while True:
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
        self.plans: deque[AccumulationWindow] = deque()
        self._window = window
        self._limit = limit
        self._count = count
        self._dp_size = dp_size
        self._consumed = 0
        # Batches of the epoch used before the current iteration, and before the next one.
        self._began = self._began_next = 0

    def advance(self) -> None:
        """Called when a batch is really used; the loop may have fetched further."""
        self._consumed += 1

    def _resumable(self) -> tuple[Any, int] | None:
        """A sampler that continues in the middle of an epoch by itself, and its items per batch."""
        for name, items in (("batch_sampler", 1), ("sampler", getattr(self._loader, "batch_size", None) or 1)):
            sampler = getattr(self._loader, name, None)
            if hasattr(sampler, "state_after"):
                return sampler, items
        return None

    def __iter__(self) -> Iterator[Any]:
        self._began, self._began_next = self._began_next, 0
        self.plans.clear()
        self._consumed = self._began
        return self._windows(self._began)

    def _windows(self, position: int) -> Iterator[Any]:
        if self._resumable():
            source = self._batches(position)
        else:
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
            # A sum over some of the micro-batches is none.
            names = set.intersection(*map(set, counts)) if counts else set()
            totals = {name: sum(count[name] for count in counts) for name in sorted(names)}
            self.plans.append(AccumulationWindow(len(batches), totals, counts))
            position += len(batches)
            yield from batches

    def state_dict(self) -> dict[str, Any]:
        """Batches used in this epoch; none once the epoch is over."""
        if self._consumed >= self._limit():
            return {"batches": 0, "dp_size": self._dp_size}
        state: dict[str, Any] = {"batches": self._consumed, "dp_size": self._dp_size}
        if resumable := self._resumable():
            sampler, items = resumable
            state["sampler"] = sampler.state_after((self._consumed - self._began) * items, items)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues behind the batches that were used, also on another number of data-parallel ranks.

        Raises:
            UlyssesError: If the batches used do not divide evenly over the new ranks, or the sampler refuses.
        """
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
