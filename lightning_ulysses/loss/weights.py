"""The weight of each micro-batch's loss, and the exact loss of the optimizer step."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ulysses.config import UlyssesConfig
from lightning_ulysses.context import LocalBatch
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.batch_keys import KEPT
from lightning_ulysses.loss.accumulation import AccumulationWindow
from lightning_ulysses.loss.evaluation import EvaluationLoss
from lightning_ulysses.loss.targets import TargetResolver, likeliest_first


@dataclass
class LossWindow:
    """The accumulation window of the current optimizer step.

    Attributes:
        size: Number of micro-batches.
        totals: N for each tensor that may hold the targets, over all micro-batches and data-parallel ranks.
        index: Index of the current micro-batch.
        loss: This rank's part of the exact loss so far.
    """

    size: int
    totals: Mapping[str, float]
    index: int = 0
    loss: Tensor | None = None

    @property
    def is_last(self) -> bool:
        """Whether the optimizer steps after the current micro-batch."""
        return self.index + 1 >= self.size

    def add(self, part: Tensor) -> None:
        """Adds one micro-batch's part of the loss."""
        self.loss = part if self.loss is None else self.loss + part


def token_weight(count: float, total: float, world_size: int) -> float:
    """The weight of a rank's mean: n_w * W / N, or 0 for a step without any target."""
    return count * world_size / total if total else 0.0


class StepWeights:
    """Weights each loss so that all ranks and micro-batches of a step add up to the mean over its targets.

    Args:
        config: The strategy's settings.
        mesh: Sizes and groups.
        device: The device for collectives.
        guesses: See `TargetResolver`.

    Attributes:
        steps: Number of optimizer steps taken.
        target_name: The tensor with the targets of the last loss. None before the first loss, and with
            ``loss_weighting="none"``.
    """

    def __init__(
        self, config: UlyssesConfig, mesh: SequenceMesh, device: torch.device, *, guesses: bool = False
    ) -> None:
        self._mesh = mesh
        self._device = device
        self._by_targets = config.loss_weighting == "tokens"
        # How often a rank's loss counts where all have the same weight: P times if slices add up to the whole.
        self._times = 1
        self._resolver = TargetResolver(config.targets, self._agree, guesses=guesses)
        # Tensors that gave the first batch the same weights, of which one is settled.
        self._tied: frozenset[str] = frozenset()
        # Those of steps of evaluation.
        self._evaluated: frozenset[str] = frozenset()
        self._window: LossWindow | None = None
        # The counts that the dataloader took ahead for this window.
        self._plan: AccumulationWindow | None = None
        # This rank's part of the loss of the last finished step, and the loss over all ranks once it is known.
        self._finished: Tensor | None = None
        self._global: Tensor | None = None
        self.steps = 0
        self.target_name: str | None = None
        # Backwards on the current batch, and since the last optimizer step.
        self._backwards = 0
        self._unstepped = 0
        self._epoch = 0

    @property
    def settled(self) -> str | None:
        """The tensor that holds the targets, once it is known."""
        return self._resolver.settled

    @property
    def by_targets(self) -> bool:
        """Whether losses are weighted by their targets; else all ranks and micro-batches have equal weights."""
        return self._by_targets

    def add_up(self) -> None:
        """Takes note of a loss that is a sum over tokens: those of slices add up to that of the batch.

        Raises:
            UlyssesError: If the user named a tensor with targets.
        """
        if self._resolver.settled is not None:
            self._check_named(self._resolver.settled, frozenset())
        self._by_targets, self._times = False, self._mesh.sp_size

    def settle_targets(self, names: frozenset[str]) -> None:
        """Takes note of the tensors that a trial of the step found to hold the targets.

        All of them give the batch that was tried the same weights. Without any, all ranks and micro-batches have equal
        weights, as in one process.

        Raises:
            UlyssesError: If the user named another tensor.
        """
        if not self._by_targets:
            return
        settled = self._resolver.settled
        if settled is not None:
            self._check_named(settled, names)
            # A mask that the user named counts the tokens that it keeps.
            names &= {settled, f"{settled}{KEPT}"}
        self._by_targets, self._tied = bool(names), names
        if names:
            self._resolver.settled = likeliest_first(names)[0]

    def settle_evaluation(self, names: frozenset[str]) -> None:
        """Takes note of the tensors that a trial found to hold the targets of steps of evaluation."""
        self._evaluated = names

    def _agree(self, scores: Tensor) -> Tensor:
        shared = scores.to(self._device)
        dist.all_reduce(shared, op=dist.ReduceOp.MIN)
        return shared.cpu()

    def _over_replicas(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Sums over data-parallel ranks, for the names that all of them have."""
        if self._mesh.dp_group is None:
            return dict(totals)
        settled = self._resolver.settled
        names = sorted(self._tied | {settled}) if settled is not None else self._shared_names(totals)
        # NaN for a missing name makes the sum NaN on all ranks, so that all of them raise in `check`.
        # On the host: sent by the device, the sum would wait for all of the last step.
        shared = torch.tensor([totals.get(name, math.nan) for name in names], dtype=torch.float64)
        dist.all_reduce(shared, group=self._mesh.replicas)
        return dict(zip(names, shared.tolist(), strict=True))

    def _shared_names(self, totals: Mapping[str, float]) -> list[str]:
        everyone: list[Any] = [None] * self._mesh.dp_size
        dist.all_gather_object(everyone, set(totals), group=self._mesh.replicas)
        return sorted(set.intersection(*everyone))

    def enter_epoch(self, epoch: int) -> None:
        """Leaves a window of another epoch behind, if no step ended it: its gradients have been dropped."""
        if epoch != self._epoch:
            self._epoch, self._window, self._unstepped = epoch, None, 0

    def begin(self, counts: Mapping[str, float], plans: deque[AccumulationWindow] | None) -> None:
        """Begins a micro-batch, and a new window after the last one of the former window.

        Args:
            counts: The targets of the batch of this group, for each tensor that may hold them.
            plans: The accumulation windows that the dataloader has loaded ahead.

        Raises:
            UlyssesError: If the targets have changed since the batch was counted.
        """
        self._backwards = 0
        if not self._by_targets:
            return
        if f"{self._resolver.settled}{KEPT}" in counts:
            # A mask that the user named counts the tokens that it keeps.
            self._resolver.settled = f"{self._resolver.settled}{KEPT}"
        if self._window is None or self._window.is_last:
            self._plan = plans.popleft() if plans else AccumulationWindow([None])
            # A window of one micro-batch was not counted ahead.
            totals = self._plan.totals if self._plan.counts else counts
            self._window = LossWindow(self._plan.size, self._over_replicas(totals))
            settled = self._resolver.settled
            # The batches of some data-parallel rank lack the tensor. The sum is NaN on all of them.
            if settled is not None and math.isnan(self._window.totals.get(settled, math.nan)):
                self._resolver.check(self._window.totals)
        else:
            self._window.index += 1
        planned = self._plan.counts if self._plan is not None else ()
        if planned and dict(planned[self._window.index]) != dict(counts):
            raise UlyssesError(
                f"a batch with targets {dict(counts)} that had {dict(planned[self._window.index])} when the dataloader "
                "yielded it",
                "targets that are final when the dataloader yields them, since a step's targets are counted ahead",
                "move what changes the labels from on_before_batch_transfer or on_after_batch_transfer to the collate "
                "function, or set accumulate_grad_batches=1",
            )

    def _check_tied(self, counts: Mapping[str, float], totals: Mapping[str, float]) -> None:
        """Raises `UlyssesError` on every rank if tensors that fitted alike weight some slice differently."""
        weights = {round(counts.get(name, 0.0) / totals[name], 9) for name in self._tied if totals.get(name)}
        if int(self._agree(torch.tensor([len(weights) <= 1], dtype=torch.int64))):
            return
        names = sorted(name.removesuffix(KEPT) for name in self._tied)
        raise UlyssesError(
            f"micro-batches of one step that {names} weight differently, while the first batch did not show which of "
            "them the loss is a mean over",
            "to know it",
            f"set targets to one of {names} in the strategy, or loss_weighting='none' to average micro-batches and "
            "groups as Lightning does",
        )

    @staticmethod
    def _check_named(settled: str, names: frozenset[str]) -> None:
        if {settled, f"{settled}{KEPT}"} & names:
            return
        over = f"a mean over those of {sorted(names)}" if names else "no mean over targets of the batch"
        right = sorted(name.removesuffix(KEPT) for name in names)[:1]
        raise UlyssesError(
            f"targets={settled.removesuffix(KEPT)!r} for a loss that is {over}",
            "the tensor that the loss is a mean over",
            f"set targets={right[0]!r} in the strategy, or leave it out" if right else "leave targets out",
        )

    def check_boundary(self, last: bool) -> None:
        """Raises `UlyssesError` if the window does not end where Lightning steps the optimizer."""
        if self._by_targets and self._window is not None and self._window.is_last != last:
            raise UlyssesError(
                f"an optimizer step {'after' if last else 'not after'} micro-batch {self._window.index + 1} of "
                f"{self._window.size}",
                "accumulation windows that follow accumulate_grad_batches and the length of the epoch",
                "use one train dataloader and do not change accumulate_grad_batches during fit",
            )

    def apply(self, loss: Tensor, live: LocalBatch, micro_batches: int, automatic: bool) -> Tensor:
        """The loss to back-propagate on this rank.

        Args:
            loss: The mean that the module returned.
            live: The batch of the running step.
            micro_batches: ``accumulate_grad_batches``.
            automatic: Whether Lightning steps the optimizer. False for manual optimization.

        Raises:
            UlyssesError: If the loss is not certain to be a mean over known targets. Also if backward is called more
                than once for a batch or, in manual optimization, for a step.
        """
        self._backwards += 1
        self._unstepped += 1
        backwards = self._backwards if automatic else self._unstepped
        # A second loss of the same batch would get the weight of all its targets again.
        if backwards > 1:
            raise UlyssesError(
                f"{backwards} backward passes without an optimizer step between them",
                "one backward pass for each batch and step, since the step's targets are counted ahead",
                "add the losses before backward"
                + ("" if automatic else ", or use automatic optimization to accumulate"),
            )
        if not self._by_targets:
            # Ranks and micro-batches have equal weights: a plain mean, as DeepSpeed and Lightning take it.
            self._window = self._window or LossWindow(micro_batches, {})
            part = loss * self._times / micro_batches
            self._window.add(part.detach().float() / self._mesh.world_size)
            return part
        assert self._window is not None
        name = self.target_name = self._target(live, self._window.totals)
        weight = token_weight(live.counts[name], self._window.totals[name], self._mesh.world_size)
        # In a step without any target the weight is 0, but 0 * NaN would still be NaN.
        if not self._window.totals[name]:
            loss = torch.nan_to_num(loss)
        # In half precision, the weighted loss would lose digits.
        weighted = loss.float() * weight
        self._window.add(weighted.detach() / self._mesh.world_size)
        return weighted

    def _target(self, live: LocalBatch, totals: Mapping[str, float]) -> str:
        settled = self._resolver.settled
        if settled is None:
            return self._resolver.resolve(live, totals)
        for counts in (live.counts, totals):
            if settled not in counts:
                self._resolver.check(counts)
        if len(self._tied) > 1:
            self._check_tied(live.counts, totals)
        return settled

    def stepped(self) -> None:
        """Ends the window. Called after the optimizer step."""
        self._backwards = self._unstepped = 0
        if self._window is not None and self._window.loss is not None:
            self._finished, self._window = self._window.loss, None
            self._global = None
            self.steps += 1

    @property
    def own_loss(self) -> Tensor:
        """This rank's part of the exact loss of the last optimizer step, () float32. The parts of all ranks add up.

        Raises:
            RuntimeError: Before the first step; see `steps`.
        """
        if self._finished is None:
            raise RuntimeError("No optimizer step has been taken yet.")
        return self._finished

    def settle(self, loss: Tensor) -> None:
        """Stores the sum of `own_loss` over all ranks, if another collective has computed it already."""
        self._global = loss

    def global_loss(self) -> Tensor:
        """The exact loss of the last optimizer step, the same on every rank; its first call is a collective.

        Raises:
            RuntimeError: Before the first step; see `steps`.
        """
        if self._global is None:
            self._global = self.own_loss.clone()
            dist.all_reduce(self._global)
        return self._global

    def evaluation(self) -> EvaluationLoss:
        """A new accumulator for the loss of one evaluation dataloader."""
        return EvaluationLoss(self._names, self._by_targets, self._device, self._times)

    def _names(self) -> list[str]:
        settled = self._resolver.settled
        return [settled] if settled is not None else likeliest_first(self._evaluated)
