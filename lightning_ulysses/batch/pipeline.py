"""From a dataloader's whole batches to this rank's slices."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from lightning_ulysses.batch.loader import SeededLoader, TrainLoader
from lightning_ulysses.batch.random_streams import named_stream
from lightning_ulysses.batch.same_batch import check_same_batch
from lightning_ulysses.batch.whole import WholeBatch, entries_of, read_batch
from lightning_ulysses.context import LiveBatch
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.batch_keys import BatchRules
from lightning_ulysses.loss.accumulation import AccumulationWindow
from lightning_ulysses.upstream import lightning as upstream_lightning

if TYPE_CHECKING:
    import lightning.pytorch as pl

_CHECKED_BATCHES = 3


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
        self._checked = {True: 0, False: 0}
        self._train_loader: TrainLoader | None = None
        self._evaluations = 0

    def wrap(self, dataloader: Any, trainer: pl.Trainer, look_ahead: bool) -> SeededLoader:
        """The dataloader with random numbers that a sequence group shares and, in training, a look ahead.

        Args:
            dataloader: The user's, with its sampler in place.
            trainer: The Trainer.
            look_ahead: Whether a step's targets have to be known before its first backward.
        """
        key = (self._seed, self._mesh.dp_rank, str(trainer.state.stage))

        def epoch() -> int:
            return trainer.current_epoch

        if not trainer.training:
            return SeededLoader(dataloader, key, epoch)
        self._train_loader = TrainLoader(
            dataloader,
            key,
            epoch,
            window=trainer.accumulate_grad_batches if look_ahead else 1,
            limit=lambda: upstream_lightning.used_batches(trainer),
            count=lambda batch: self._read(trainer.precision_plugin.convert_input(batch)).counts_of_group(),
            dp_size=self._mesh.dp_size,
        )
        return self._train_loader

    def _read(self, batch: Any) -> WholeBatch:
        return read_batch(batch, self._rules, self._mesh.sp_size)

    def read(self, batch: Any, training: bool) -> WholeBatch:
        """Reads a batch; the first ones of training and of evaluation are compared over the sequence group.

        Raises:
            UlyssesError: If it is not understood, or ranks hold different ones.
        """
        whole = self._read(batch)
        self._checked[training] += 1
        if self._checked[training] <= _CHECKED_BATCHES:
            check_same_batch(whole, self._mesh, self._device, everywhere=training)
        return whole

    def cut(self, whole: WholeBatch, training: bool, move: Callable[[Any], Any]) -> tuple[Any, LiveBatch]:
        """This rank's slice on the device, and what is known about it.

        Args:
            whole: From `read`.
            training: Whether a slice without a target needs a stand-in.
            move: Moves a batch to the device and runs the user's hooks on it.
        """
        rank = self._mesh.sp_rank
        sharded, shards, seen = whole.shard(rank, stand_in=training)
        result = move(sharded)
        moved = entries_of(result)
        live = LiveBatch(
            whole.layout,
            # The very tensors that the module gets, so that they are recognised by their address.
            shards={key: moved[key] if key in moved else t.to(self._device) for key, t in shards.items()},
            counts=whole.counts_of_rank(rank),
            seen=seen,
            rows=whole.rows,
            whole=whole.whole,
        )
        return result, live

    def drawing(self, where: str, trainer: pl.Trainer) -> AbstractContextManager[None]:
        """Random numbers that the ranks of a sequence group share, and that a resumed run draws again.

        A step may draw what concerns a sample as a whole, such as its noise level, or whether a layer is left out, and
        then ranks that draw otherwise train on another sample, or wait for each other forever.
        """
        if self._mesh.sp_size == 1:
            return nullcontext()
        when: tuple[object, ...] = (trainer.current_epoch, trainer.fit_loop.total_batch_idx)
        if not trainer.training:
            self._evaluations += 1
            when = (trainer.global_step, self._evaluations)
        name = (self._seed, self._mesh.dp_rank, str(trainer.state.stage), where, *when)
        return named_stream(*name, device=self._device)

    def use(self) -> deque[AccumulationWindow] | None:
        """Notes that a training batch is used; the windows that the dataloader has looked ahead over."""
        if self._train_loader is None:
            return None
        self._train_loader.advance()
        return self._train_loader.plans
