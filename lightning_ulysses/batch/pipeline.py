"""Turns a dataloader's whole batches into this rank's slices."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lightning_ulysses.attention.mask_table import note_documents
from lightning_ulysses.batch.clock import Clock
from lightning_ulysses.batch.loader import SeededLoader, TrainLoader
from lightning_ulysses.batch.random_streams import named_stream
from lightning_ulysses.batch.recognition import entries_of
from lightning_ulysses.batch.same_batch import SameBatches
from lightning_ulysses.batch.same_length import SameLength
from lightning_ulysses.batch.whole import WholeBatch, read_batch
from lightning_ulysses.context import LocalBatch
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.batch_keys import KEPT, BatchRules
from lightning_ulysses.loss.accumulation import AccumulationWindow

# Documents of the whole row, under the names of transformers and flash-attn.
_CU_SEQLENS = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens_q", "cu_seqlens_k")


def _same(batch: Any) -> Any:
    return batch


def local_batch(
    whole: WholeBatch,
    rank: int,
    move: Callable[[Any], Any],
    device: torch.device,
    *,
    stand_in: bool,
    targets: str | None = None,
) -> tuple[Any, LocalBatch]:
    """One rank's slice on the device: the batch for the module, and what is known about it.

    Args:
        whole: The batch.
        rank: Whose slice.
        move: Moves a batch to the device and runs the user's hooks on it.
        device: The device.
        stand_in: See `WholeBatch.shard`.
        targets: The same.
    """
    pin = device.type == "cuda"
    sharded, shards, seen = whole.shard(rank, stand_in=stand_in, targets=targets, pin=pin)
    result = move(sharded)
    moved = entries_of(result, deep=True)
    local = LocalBatch(
        whole.layout,
        # The very tensors that the module gets, so that they are recognised.
        shards={key: moved[key] if key in moved else t.to(device, non_blocking=pin) for key, t in shards.items()},
        counts=whole.counts_of_rank(rank),
        seen=seen,
        rows=whole.rows,
        whole=whole.whole,
    )
    _note_documents(whole, moved, local)
    return result, local


def _note_documents(whole: WholeBatch, moved: Mapping[str, Any], local: LocalBatch) -> None:
    """Takes note of what the batch's ``cu_seqlens`` say, which are read here on the host, for where they were moved."""
    host = entries_of(whole.template, deep=True)
    for key in _CU_SEQLENS:
        given, there = host.get(key), moved.get(key)
        if isinstance(given, Tensor) and isinstance(there, Tensor) and given.dim() == 1 and given.shape == there.shape:
            note_documents(local, there, given.tolist())


def fill_mask(local: LocalBatch, name: str) -> None:
    """Has a mask of the user's own keep one token of a slice of which it keeps none, see `WholeBatch.shard`.

    Args:
        local: The slice; the module holds the same tensors.
        name: The name of its counts.
    """
    key = name.removesuffix(KEPT)
    if key != name and not local.counts[name] and key in local.shards:
        local.shards[key].view(-1)[0] = 1


class BatchPipeline:
    """Wraps dataloaders, reads batches, compares them over a group, and cuts them.

    Args:
        rules: The rules for reading a batch.
        mesh: Sizes and groups.
        device: The device of the model.
        seed: The run's seed, the same on every rank.
    """

    def __init__(self, rules: BatchRules, mesh: SequenceMesh, device: torch.device, seed: int) -> None:
        self._rules = rules
        # Of kinds of steps for which it is decided how they are split.
        self._decided: dict[str, BatchRules] = {}
        self._fallback: BatchRules | None = None
        #: Why the batches of kinds of steps cannot be cut.
        self.unread: dict[str, UlyssesError] = {}
        self._mesh = mesh
        self._device = device
        self._seed = seed
        self.same = SameBatches(mesh, device)
        self._same_length = SameLength(mesh, device)
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
        """The dataloader with random numbers that a group shares and, in training, with look-ahead.

        Args:
            dataloader: The user's dataloader with its final sampler.
            now: Returns the progress of the run.
            looks_ahead: Whether a step's targets must be known before its first backward.
            limit: Returns the number of training batches of an epoch that will be used; infinite if unknown.
            prepare: Turns a batch into the one that `read` will get.
        """
        clock = now()
        key = (self._seed, self._mesh.dp_rank, clock.stage)

        def epoch() -> int:
            return now().epoch

        if not clock.is_training:
            return SeededLoader(dataloader, key, epoch)
        most, asks = self._same_length.of_epoch(dataloader)
        self._train_loader = TrainLoader(
            dataloader,
            key,
            epoch,
            window=clock.accumulate if looks_ahead else 1,
            limit=limit,
            is_last=lambda: now().is_last,
            returns=clock.is_automatic,
            # Counts the batch as `read` will get it. `StepWeights.begin` refuses one whose targets change later.
            count=lambda batch: self._read(prepare(batch), clock.kind).counts_of_group(),
            dp_size=self._mesh.dp_size,
            dp_rank=self._mesh.dp_rank,
            most=most,
            shared=self._same_length.of_window if asks else int,
        )
        return self._train_loader

    def fall_back(self, rules: BatchRules, always: bool) -> None:
        """Has batches that cannot be cut read by other rules, until it is decided how their step is split.

        Args:
            rules: Those of batches that every rank gets whole.
            always: Whether no batch is cut.
        """
        self._fallback, self._rules = rules, rules if always else self._rules

    def use(self, kind: str, rules: BatchRules) -> None:
        """Decides how batches of a kind of step are read."""
        self._decided[kind] = rules

    def _read(self, batch: Any, kind: str) -> WholeBatch:
        rules = self._decided.get(kind)
        try:
            return read_batch(batch, rules or self._rules, self._mesh.sp_size)
        except UlyssesError as error:
            if rules is not None or self._fallback is None:
                raise
            self.unread[kind] = error
        return read_batch(batch, self._fallback, self._mesh.sp_size)

    def read(self, batch: Any, clock: Clock) -> WholeBatch:
        """Reads a batch. It is compared over the group, see `SameBatches`.

        Raises:
            UlyssesError: If the batch cannot be read for certain, or the ranks of a group hold different batches.
        """
        whole = self._read(batch, clock.kind)
        self.same.check(whole, clock.kind, everywhere=clock.is_training)
        return whole

    def cut(
        self, whole: WholeBatch, is_training: bool, move: Callable[[Any], Any], targets: str | None = None
    ) -> tuple[Any, LocalBatch]:
        """This rank's slice on the device, as the batch for the module and as a `LocalBatch`.

        Args:
            whole: The result of `read`.
            is_training: Whether a slice without a target gets a stand-in target.
            move: Moves a batch to the device and runs the user's hooks on it.
            targets: The tensor that holds the targets, once it is known.
        """
        return local_batch(whole, self._mesh.sp_rank, move, self._device, stand_in=is_training, targets=targets)

    def drawing(self, where: str, clock: Clock) -> AbstractContextManager[None]:
        """A context with random numbers that do not depend on P, and that a resumed run draws again.

        Some draws of a step concern the whole sample. If ranks drew different noise levels, they would train on
        different samples. If they dropped different layers, they would deadlock.
        """
        when = (clock.epoch, clock.batch)
        if not (clock.is_training or clock.is_counted):
            # Evaluation has no counter that a run restores, so calls are counted within the process.
            self._evaluations += 1
            when = (clock.step, self._evaluations)
        return named_stream(self._seed, self._mesh.dp_rank, clock.stage, where, *when, device=self._device)

    def stepped(self) -> None:
        """Notes that the optimizer has stepped on all training batches taken so far."""
        if self._train_loader is not None:
            self._train_loader.stepped()

    def take(self) -> deque[AccumulationWindow] | None:
        """Counts a training batch as used, and returns the windows that the dataloader has loaded ahead."""
        if self._train_loader is None:
            return None
        self._train_loader.advance()
        return self._train_loader.plans
