"""Packs an iterable source on the fly, identically on every rank, and deals the packs to ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, ClassVar, Literal, NoReturn, get_args

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import IterableDataset, get_worker_info
from typing_extensions import override

from lightning_ulysses.context import current_context
from lightning_ulysses.data.buffer import Pack, PackingPass, PackingRules, spread
from lightning_ulysses.data.collate import PackingCollator
from lightning_ulysses.data.data_rank import Place, given_place, place_in
from lightning_ulysses.data.packing import Overlong
from lightning_ulysses.data.source import Source, check_source, read_whole
from lightning_ulysses.errors import UlyssesError

_BUFFERED_PACKS = 16


@dataclass(frozen=True)
class _Deal:
    """How rounds are dealt; ``workers`` is 0 in the main process."""

    worker: int
    workers: int
    num_replicas: int
    rows_per_batch: int


def _check_least(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UlyssesError(f"{name}={value!r}", f"a whole number of at least {least}", f"change {name}")


def _check_deal(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises if a worker resumes under another deal: its share of the rounds fits only the other workers' shares."""
    if (saved["workers"] or now["workers"]) and dict(saved) != dict(now):
        raise UlyssesError(
            f"a state saved under {dict(saved)}, resumed under {dict(now)}",
            "the same dataloader workers, ranks and rows, unless neither run has workers",
            "resume with the former num_workers, through torchdata's StatefulDataLoader",
        )


class PackedStream(IterableDataset[Any]):
    """Packs the documents of an iterable source into batches with at most ``max_tokens`` tokens per row.

    Every rank and every dataloader worker reads the whole source and packs it identically. A *round* is one batch for
    each data-parallel rank. Each rank collates only its own batch of a round, and its workers take turns. Packing takes
    about 50 microseconds per document. Three things follow, without a collective and without knowing the length of the
    source:

    - Ranks of a sequence-parallel group get the same batches, data-parallel ranks disjoint ones.
    - All ranks end at the same step.
    - A state saved without workers fits any number of data-parallel ranks, since it is a place in one common order.

    The price is that every process reads the source. Workers speed up collating, but not reading. If tokenizing is
    slower than training on all data-parallel ranks together, store the tokens first.

    The source must give the same documents to every process. Rows that are drawn or shuffled with the global random
    generators are the same, since the stream seeds those while it reads. Streaming datasets of Hugging Face and of
    litdata are kept from splitting themselves over workers and ranks.

    Documents wait in a buffer. A pack consists of the oldest document and those that fill the rest best.

    Args:
        source: Rows as `PackingCollator` takes them: a generator function (not a generator), or anything that can be
            iterated over from its start again and again.
        max_tokens: Most tokens of a pack.
        overlong: How to handle longer documents: ``"split"`` into documents of their own, ``"truncate"``, ``"drop"`` or
            ``"error"``. Truncated and dropped ones are counted in `left_out` and reported at the end.
        buffer_tokens: Tokens that must wait before a pack is built; 16 packs by default. With a larger buffer, packs
            are fuller.
        rows_per_batch: B, the number of packs in a batch.
        last_round: At the end, too few packs for a batch on every rank may be left. ``"spread"`` splits packs between
            documents until every rank has one. A rank for which no document is left gets a batch without targets.
            ``"drop"`` leaves the last packs out.
        collate_fn: Makes a batch of B packs, each a list of documents; `PackingCollator` by default.
        seed: Seed of the random numbers that the source draws, together with the epoch.
        num_replicas: Number of data-parallel ranks; by default the strategy's.
        rank: The data-parallel rank, never the rank within a sequence-parallel group.

    Raises:
        UlyssesError: For a source that can be read only once, or a setting out of range.

    Example:
        >>> stream = PackedStream(lambda: map(tokenize, open("corpus.jsonl")), max_tokens=65536)
        >>> loader = DataLoader(stream, batch_size=None, num_workers=2)
    """

    #: All ranks end at the same step, so that nobody has to ask.
    ends_together: ClassVar[bool] = True

    def __init__(
        self,
        source: Source,
        max_tokens: int,
        *,
        overlong: Overlong = "split",
        buffer_tokens: int | None = None,
        rows_per_batch: int = 1,
        last_round: Literal["spread", "drop"] = "spread",
        collate_fn: Callable[[list[Pack]], Any] | None = None,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        check_source(source)
        _check_least("max_tokens", max_tokens, 1)
        self.source = source
        self.rules = PackingRules(
            max_tokens, overlong, _BUFFERED_PACKS * max_tokens if buffer_tokens is None else buffer_tokens
        )
        self.rows_per_batch = rows_per_batch
        self.last_round = last_round
        self.collate_fn = PackingCollator() if collate_fn is None else collate_fn
        self.seed = seed
        self._given = given_place(num_replicas, rank)
        self._check()
        self._inherited: Place | None = None
        # In shared memory, so that `set_epoch` reaches workers that live for several epochs.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._loaded: dict[str, Any] | None = None
        self._pass: PackingPass | None = None
        self._deal = _Deal(0, 0, 1, rows_per_batch)
        self._rounds = 0
        self._is_over = False

    @property
    def resume_settings(self) -> dict[str, Any]:
        """The settings that decide which documents a batch holds, and so must stay the same within an epoch."""
        own = {"rows_per_batch": self.rows_per_batch, "last_round": self.last_round, "seed": self.seed}
        return {**asdict(self.rules), **own}

    def _check(self) -> None:
        _check_least("buffer_tokens", self.rules.buffer_tokens, self.rules.max_tokens)
        _check_least("rows_per_batch", self.rows_per_batch, 1)
        for name, value, choices in (
            ("overlong", self.rules.overlong, get_args(Overlong)),
            ("last_round", self.last_round, ("spread", "drop")),
        ):
            if value not in choices:
                raise UlyssesError(f"{name}={value!r}", f"one of {list(choices)}", f"change {name}")

    def _known_place(self) -> Place | None:
        """The number of data-parallel ranks and this process's rank, as far as this process knows."""
        context = current_context()
        if context is not None:
            return place_in(context.mesh, self._given, self.rules.max_tokens)
        if self._given is None and dist.is_available() and dist.is_initialized():
            return dist.get_world_size(), dist.get_rank()
        return self._given or self._inherited

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker has neither the strategy nor the process group, so it gets the place from here.
        return {**self.__dict__, "_inherited": self._known_place(), "_pass": None}

    def __len__(self) -> NoReturn:
        # Lightning and others take a TypeError to mean that the length is not known.
        raise TypeError(
            "A PackedStream has no length: how many packs its documents make is known once they have been read. Set "
            "Trainer(max_steps=...) or limit_train_batches, or use SequenceShardSampler for a dataset with a length."
        )

    # Without this, `if stream:` would ask for the length.
    def __bool__(self) -> bool:
        return True

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration read the source as in ``epoch``, also in workers that are already running."""
        if epoch != int(self._epoch):
            self._loaded = None
        self._epoch.fill_(epoch)

    @property
    def left_out(self) -> dict[str, int]:
        """Documents truncated or dropped for their length, and the tokens lost, in this process's latest iteration."""
        return dict(self._pass.left_out) if self._pass is not None else {"documents": 0, "tokens": 0}

    @override
    def __iter__(self) -> Iterator[Any]:
        state, self._loaded = self._loaded, None
        replicas, rank = self._known_place() or (1, 0)
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 0)
        deal = _Deal(worker, workers, replicas, self.rows_per_batch)
        if state is not None:
            _check_deal(state["deal"], asdict(deal))
        epoch = int(self._epoch)
        self._pass = PackingPass(
            self.rules, lambda: read_whole(self.source, epoch, self.seed), state["pass"] if state else None
        )
        self._deal = deal
        self._rounds = state["rounds"] if state else 0
        self._is_over = bool(state and state["is_over"])
        return self._batches(self._pass, deal, rank)

    def _batches(self, packing: PackingPass, deal: _Deal, rank: int) -> Iterator[Any]:
        if self._is_over:
            return
        rows, packs = deal.rows_per_batch, packing.packs()
        while group := list(islice(packs, deal.num_replicas * rows)):
            if len(group) == deal.num_replicas * rows:
                share = group[rank * rows : (rank + 1) * rows]
            elif self.last_round == "spread":
                share = spread(group, deal.num_replicas)[rank]
            else:
                break
            self._rounds += 1
            if (self._rounds - 1) % max(1, deal.workers) == deal.worker:
                yield self.collate_fn(share)
        self._is_over = True
        if not self._rounds:
            raise self._nothing(packing, len(group), deal)
        if (rank, deal.worker) == (0, 0) and packing.left_out["documents"]:
            rank_zero_warn(
                f"{packing.left_out['documents']} of {packing.documents} documents were longer than "
                f"max_tokens={self.rules.max_tokens}; overlong={self.rules.overlong!r} left out "
                f"{packing.left_out['tokens']} of their tokens."
            )

    @staticmethod
    def _nothing(packing: PackingPass, packs: int, deal: _Deal) -> UlyssesError:
        return UlyssesError(
            f"a source of {packing.documents} documents, {packing.left_out['documents']} of them overlong, that makes "
            f"{packs} packs",
            f"at least {deal.rows_per_batch} packs for each of {deal.num_replicas} data-parallel ranks",
            "check that the source yields documents; set last_round='spread', overlong='split', or lower max_tokens",
        )

    def state_dict(self) -> dict[str, Any]:
        """The place after the batch that was yielded last. It is small, since documents are stored by their numbers.

        Without workers it fits any number of data-parallel ranks. With workers, each has its own state, which
        torchdata's ``StatefulDataLoader`` saves and loads.
        """
        if self._pass is None or (self._is_over and not self._deal.workers):
            # After a pass that is over comes a new one. A worker still saves its end, since others may not have reached
            # theirs.
            return self._loaded or {}
        return {
            "rules": asdict(self.rules) | {"seed": self.seed},
            "deal": asdict(self._deal),
            "epoch": int(self._epoch),
            "rounds": self._rounds,
            "is_over": self._is_over,
            "pass": self._pass.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Makes the next iteration continue at ``state``. The source is read again up to there.

        Raises:
            UlyssesError: If the state belongs to other settings; when iterating, if it belongs to another source.
        """
        rules = asdict(self.rules) | {"seed": self.seed}
        if state and state["rules"] != rules:
            raise UlyssesError(
                f"a state saved with {state['rules']}", f"one saved with {rules}", "resume with the former settings"
            )
        self._loaded = dict(state) or None
        self._pass = None
        if state:
            self._epoch.fill_(state["epoch"])
