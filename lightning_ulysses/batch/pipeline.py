"""From a dataloader's whole batches to this rank's slices."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from lightning_ulysses.batch.clock import Clock
from lightning_ulysses.batch.loader import SeededLoader, TrainLoader
from lightning_ulysses.batch.random_streams import named_stream
from lightning_ulysses.batch.recognition import entries_of
from lightning_ulysses.batch.same_batch import check_same_batch
from lightning_ulysses.batch.whole import WholeBatch, read_batch
from lightning_ulysses.context import LocalBatch
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.batch_keys import BatchRules
from lightning_ulysses.loss.accumulation import AccumulationWindow

# Batches of each kind that are compared over a group.
_COMPARED = 3


def _same(batch: Any) -> Any:
    return batch


class BatchPipeline:
    """Wraps dataloaders, reads batches, compares the first ones over ranks, and cuts them.

    Args:
        rules: How to read a batch.
        mesh: Sizes and groups.
        device: Where the model is.
        seed: The run's seed, the same on every rank.
    """

    def __init__(self, rules: BatchRules, mesh: SequenceMesh, device: torch.device, seed: int) -> None:
        self._rules = rules
        self._mesh = mesh
        self._device = device
        self._seed = seed
        self._compared = {True: 0, False: 0}
        self._train_loader: TrainLoader | None = None
        self._evaluations = 0

    def wrap(
        self,
        dataloader: Any,
        now: Callable[[], Clock],
        *,
        looks_ahead: bool,
        limit: Callable[[], float],
        prepare: Callable[[Any], Any] = _same,
    ) -> SeededLoader:
        """The dataloader with random numbers that a sequence group shares and, in training, a look ahead.

        Args:
            dataloader: The user's, with its sampler in place.
            now: Tells where the run stands.
            looks_ahead: Whether a step's targets have to be known before its first backward.
            limit: Training batches of an epoch that will be used; infinite if that is unknown.
            prepare: Turns a batch into the one that `read` will see.
        """
        clock = now()
        key = (self._seed, self._mesh.dp_rank, clock.stage)

        def epoch() -> int:
            return now().epoch

        if not clock.is_training:
            return SeededLoader(dataloader, key, epoch)
        self._train_loader = TrainLoader(
            dataloader,
            key,
            epoch,
            window=clock.accumulate if looks_ahead else 1,
            limit=limit,
            count=lambda batch: self._read(prepare(batch)).counts_of_group(),
            dp_size=self._mesh.dp_size,
        )
        return self._train_loader

    def _read(self, batch: Any) -> WholeBatch:
        return read_batch(batch, self._rules, self._mesh.sp_size)

    def read(self, batch: Any, is_training: bool) -> WholeBatch:
        """Reads a batch; the first ones of training and of evaluation are compared over the sequence group.

        Raises:
            UlyssesError: If it is not understood, or ranks hold different ones.
        """
        whole = self._read(batch)
        self._compared[is_training] += 1
        if self._compared[is_training] <= _COMPARED:
            check_same_batch(whole, self._mesh, self._device, everywhere=is_training)
        return whole

    def cut(self, whole: WholeBatch, is_training: bool, move: Callable[[Any], Any]) -> tuple[Any, LocalBatch]:
        """This rank's slice on the device, and what is known about it.

        Args:
            whole: From `read`.
            is_training: Whether a slice without a target needs a stand-in.
            move: Moves a batch to the device and runs the user's hooks on it.
        """
        rank = self._mesh.sp_rank
        sharded, shards, seen = whole.shard(rank, stand_in=is_training)
        result = move(sharded)
        moved = entries_of(result)
        local = LocalBatch(
            whole.layout,
            # The very tensors that the module gets, so that they are recognised.
            shards={key: moved[key] if key in moved else t.to(self._device) for key, t in shards.items()},
            counts=whole.counts_of_rank(rank),
            seen=seen,
            rows=whole.rows,
            whole=whole.whole,
        )
        return result, local

    def drawing(self, where: str, clock: Clock) -> AbstractContextManager[None]:
        """Random numbers that the ranks of a sequence group share, and that a resumed run draws again.

        A step may draw what concerns a sample as a whole, such as its noise level, or whether a layer is left out, and
        then ranks that draw otherwise train on another sample, or wait for each other forever.
        """
        if self._mesh.sp_size == 1:
            return nullcontext()
        when = (clock.epoch, clock.batch)
        if not clock.is_training:
            self._evaluations += 1
            when = (clock.step, self._evaluations)
        return named_stream(self._seed, self._mesh.dp_rank, clock.stage, where, *when, device=self._device)

    def use(self) -> deque[AccumulationWindow] | None:
        """Notes that a training batch is used; the windows that the dataloader has looked ahead over."""
        if self._train_loader is None:
            return None
        self._train_loader.advance()
        return self._train_loader.plans
