"""Packs of documents for each data-parallel rank: full, of similar cost, and the same again after a restart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import numpy as np
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DistributedSampler, Sampler
from typing_extensions import override

from lightning_ulysses.context import current_context
from lightning_ulysses.cost.model import CostModel
from lightning_ulysses.data.balance import Deal
from lightning_ulysses.data.data_rank import Place, given_place, place_in
from lightning_ulysses.data.dataset import Lengths, PackedDataset, read_lengths
from lightning_ulysses.data.epoch_plan import PackingPlan, PackingReport, PackingSettings, Segments, begun
from lightning_ulysses.data.packing import Overlong, Pack
from lightning_ulysses.errors import UlyssesError


class SequenceShardSampler(DistributedSampler[Pack]):
    """Yields packs of documents, for ``DataLoader(sampler.packed, sampler=sampler, batch_size=None)``.

    A pack is a list with the number of each whole document and a `Piece` for each part of one. All ranks of a
    sequence-parallel group get the same packs. Data-parallel ranks get different packs, and equally many. Within a
    step, the packs of the ranks have similar cost. No document is lost or repeated within an epoch, even if the epoch
    is resumed on another number of ranks.

    Pass it as ``sampler``. Lightning leaves a ``DistributedSampler`` in that place alone and tells it the epoch. A
    batch sampler it takes apart, unless ``use_distributed_sampler=False``. A pack is then one item of a DataLoader.
    These DataLoaders are possible:

    - ``DataLoader(sampler.packed, sampler=sampler, batch_size=None, collate_fn=PackingCollator())`` makes a row (1, S)
      of each pack. ``batch_size=B`` makes (B, S) of B packs. ``sampler.packed`` wraps the dataset and cuts documents
      that are only partly in a pack. The dataset itself needs no code for this.
    - A dataset that takes a list of numbers as index can be passed unwrapped, if no document is cut.
    - ``DataLoader(dataset, batch_sampler=sampler)`` passes the documents of any dataset to ``collate_fn``. This works
      outside of a distributed Trainer, if no document is cut.

    Args:
        dataset: The documents: anything with ``len`` and ``[]``.
        lengths: Tokens of each: an array; the name of a column with the lengths, or with the tokens; or a function of
            the dataset.
        max_tokens: Most tokens of a pack.
        overlong: How to handle longer documents: ``"split"`` cuts them into pieces that are documents of their own.
            Else ``"truncate"``, ``"drop"`` or ``"error"``.
        window: Tokens of documents that are packed together, as a number of full packs. With larger windows, packs are
            fuller and packing is slower. With smaller ones, it is more random which documents share a pack.
        cost: The cost of a pack, such as ``CostModel.from_config(model.config)``.
        num_replicas: Number of data-parallel ranks. By default the strategy's, else the process group's, else 1. It is
            looked up when iterating or counting, since samplers are made before processes are connected.
        rank: This process's data-parallel rank, given together with ``num_replicas``.
        shuffle: Packs and orders documents anew in each epoch.
        seed: The same on all ranks. Packs depend on (seed, epoch) alone.
        drop_last: Leaves out the packs of an incomplete last step. Otherwise some packs are split to complete it.

    Raises:
        UlyssesError: For lengths that are not positive integers or do not fit the dataset. For a document that is too
            long with ``"error"``. For settings out of range. When iterating, for a rank without a pack. When a list of
            documents is indexed with a pack, because ``packed`` was not used.
    """

    def __init__(
        self,
        dataset: Any,
        lengths: Lengths,
        max_tokens: int,
        *,
        overlong: Overlong = "error",
        window: int = 64,
        cost: CostModel | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        # Not DistributedSampler.__init__, which needs to know the ranks already.
        Sampler.__init__(self)
        settings = PackingSettings(
            max_tokens=max_tokens,
            overlong=overlong,
            window=window,
            cost=CostModel() if cost is None else cost,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
        )
        self.dataset = dataset
        self.lengths = read_lengths(dataset, lengths)
        self.max_tokens = int(max_tokens)
        self.shuffle = shuffle
        self.seed = int(seed)
        self.drop_last = drop_last
        self.epoch = 0
        self._given = given_place(num_replicas, rank)
        self._former: Place | None = None
        self._plan = PackingPlan(self.lengths, settings)
        self._segments: Segments = ()
        self._items = 1
        self._yielded = 0
        pieces = self._plan.pieces
        if pieces.lost_tokens:
            rank_zero_warn(
                f"{pieces.overlong} of {len(self.lengths)} documents are longer than max_tokens={max_tokens}; "
                f"overlong={overlong!r} loses {pieces.lost_tokens} of {self.lengths.sum(dtype=np.int64)} tokens."
            )

    def _place(self) -> Place:
        """The number of data-parallel ranks, and this process's rank."""
        context = current_context()
        if context is None:
            live = (dist.get_world_size(), dist.get_rank()) if dist.is_available() and dist.is_initialized() else (1, 0)
            # `_former`, since Lightning asks for the length once more after the teardown of the strategy.
            return self._given or self._former or live
        self._former = place_in(context.mesh, self._given, self.max_tokens)
        return self._former

    @property
    def num_replicas(self) -> int:  # type: ignore[override]
        """Number of data-parallel ranks."""
        return self._place()[0]

    @property
    def rank(self) -> int:  # type: ignore[override]
        """This process's data-parallel rank."""
        return self._place()[1]

    @property
    def num_samples(self) -> int:  # type: ignore[override]
        """Packs of this rank in the epoch."""
        return len(self)

    @property
    def total_size(self) -> int:  # type: ignore[override]
        """Packs of all data-parallel ranks in the epoch."""
        return len(self) * self.num_replicas

    @property
    def batch_size(self) -> NoReturn:
        """Does not exist. Lightning asks for it before it builds a batch sampler around another sampler.

        Raises:
            AttributeError: Without a process group, where Lightning replaces no sampler.
            UlyssesError: With a process group.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise AttributeError("batch_size")
        raise UlyssesError(
            "DataLoader(batch_sampler=SequenceShardSampler(...)) in a Trainer with a distributed strategy",
            "it in the place of sampler, where Lightning leaves a distributed sampler alone",
            "use DataLoader(sampler.packed, sampler=sampler, batch_size=None, collate_fn=PackingCollator())",
        )

    @property
    def packed(self) -> PackedDataset:
        """The dataset, wrapped so that it takes packs as index."""
        return PackedDataset(self.dataset, self.lengths)

    def _position(self, ranks: int) -> tuple[Segments, int]:
        """The packs used before this number of ranks took over, and the steps of these ranks since then."""
        if self._segments and self._segments[-1][0] == ranks:
            return self._segments[:-1], self._segments[-1][1] // ranks
        return self._segments, 0

    def _deal(self) -> Deal:
        ranks = self._place()[0]
        return self._plan.deal(self.epoch, self._position(ranks)[0], ranks, self._items)

    @override
    def __iter__(self) -> Iterator[Pack]:
        # Once a resumed epoch has been iterated to its end, the next iteration starts at the beginning. A resumed epoch
        # that had no step left yields nothing until the next epoch is set.
        if self._segments and self._yielded and self._is_over(self._yielded):
            self._segments = ()
        self._yielded = 0
        return self._iterate()

    def _iterate(self) -> Iterator[Pack]:
        # A generator runs this only when the first pack is asked for. By then Lightning has set the epoch.
        dealt = self._deal()
        ranks, rank = self._place()
        for step in dealt.steps[self._position(ranks)[1] :]:
            self._yielded += 1
            yield self._plan.pack(dealt.packs, int(step[rank]))

    @override
    def __len__(self) -> int:
        """Packs of this rank in the whole epoch. It is the same in every epoch, also in a resumed one."""
        ranks = self._place()[0]
        return begun(self._position(ranks)[0], ranks, self._items) + len(self._deal().steps)

    @override
    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration pack anew. The epoch of a loaded state is continued instead."""
        if epoch != self.epoch:
            self._segments = ()
            self._yielded = 0
        self.epoch = epoch

    def report(self) -> PackingReport:
        """Statistics of the current epoch on the current ranks. After resuming, those of its rest."""
        return self._plan.report(self._deal())

    def _is_over(self, used: int) -> bool:
        dealt = self._deal()
        return self._position(dealt.steps.shape[1])[1] + used >= len(dealt.steps)

    def state_after(self, used: int, items: int = 1) -> dict[str, Any]:
        """The place in this epoch. It is small, the same on all ranks, and valid for any number of ranks.

        Args:
            used: Packs of this rank that were trained on since the iteration began.
            items: Packs in a batch of this rank.
        """
        self._items = items
        state: dict[str, Any] = {"epoch": self.epoch, "fingerprint": self._plan.fingerprint, "segments": []}
        state["items"] = items
        if not used and not self._segments:
            return state
        if self._is_over(used):
            return {**state, "epoch": self.epoch + 1}
        ranks = self._place()[0]
        former, steps = self._position(ranks)
        state["segments"] = [list(segment) for segment in (*former, (ranks, (steps + used) * ranks)) if segment[1]]
        return state

    def state_dict(self) -> dict[str, Any]:
        """`state_after` the packs yielded so far. A DataLoader with workers asks for some ahead of time."""
        return self.state_after(self._yielded, self._items)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Makes the next iteration continue after the packs that were used, on any number of data-parallel ranks.

        Raises:
            UlyssesError: If the state belongs to another dataset, seed or setting.
        """
        if state.get("fingerprint") != self._plan.fingerprint:
            raise UlyssesError(
                f"a state of [{state.get('fingerprint')}]",
                f"one of [{self._plan.fingerprint}]",
                "resume with the dataset, the seed and the settings that it was saved with",
            )
        self.epoch = int(state["epoch"])
        self._items = int(state["items"])
        self._segments = tuple((int(ranks), int(used)) for ranks, used in state["segments"])
        self._yielded = 0
