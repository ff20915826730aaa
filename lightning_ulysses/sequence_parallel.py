"""Sequence parallelism for one module, without Lightning and without DeepSpeed: the strategy is a shell around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ulysses import memory
from lightning_ulysses.attention.kernel_report import KernelReport
from lightning_ulysses.batch.clock import Clock
from lightning_ulysses.batch.loader import SeededLoader
from lightning_ulysses.batch.pipeline import BatchPipeline, fill_mask
from lightning_ulysses.batch.predictions import join_outputs
from lightning_ulysses.batch.whole import WholeBatch
from lightning_ulysses.checks.step import check_backward, check_intercepted
from lightning_ulysses.checks.trial import SplitChoice, aside, explained, state_kept
from lightning_ulysses.config import UlyssesConfig
from lightning_ulysses.context import LocalBatch, SequenceContext, activate, current_context
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.agreement import RunningDigest
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.exchange.turns import BackwardTurns
from lightning_ulysses.interceptors.install_all import install_interceptors
from lightning_ulysses.loss.weights import StepWeights
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.planning.auto import AutoMemory
from lightning_ulysses.planning.zero import Sharding


def _same(batch: Any) -> Any:
    return batch


class SequenceParallel:
    """Cuts batches, has attention exchange slices for heads, and weights losses.

    Gradients are left to the caller, who averages them over all W processes of the world, as ZeRO does.

    Args:
        settings: The strategy's settings.
        mesh: Sizes and groups.
        device: Where the model is.
        seed: The run's seed, the same on every rank.

    Attributes:
        context: Where the running step stands.
        weights: The weights of losses, and the exact loss of the last step.

    Example:
        >>> parallel = SequenceParallel(settings, mesh, device, seed=0)
        >>> with parallel.installed(module):
        ...     for batch in batches:
        ...         inputs = parallel.receive(batch, clock)
        ...         inputs = parallel.try_step(clock, lambda batch: module.training_step(batch, 0), inputs)
        ...         with parallel.step(clock, "training_step"):
        ...             loss = module.training_step(inputs, 0)
        ...         with parallel.backward():
        ...             parallel.weigh(loss).backward()
        ...         average_gradients(module)
        ...         optimizer.step()
        ...         parallel.stepped()
    """

    def __init__(
        self, settings: UlyssesConfig, mesh: SequenceMesh, device: torch.device, seed: int, *, refuses: bool = True
    ) -> None:
        self.settings = settings
        self.mesh = mesh
        self.context = SequenceContext(mesh, settings.plan)
        self.weights = StepWeights(settings, mesh, device, guesses=not refuses)
        self._device = device
        self._pipeline = BatchPipeline(settings.rules, mesh, device, seed)
        self._handle = Handle()
        self._choice = SplitChoice(settings, self.context, self._pipeline, self.weights, device, refuses)
        self._module: nn.Module = nn.Identity()
        self._clock = Clock()
        # The batch of the following step, as it came.
        self._batch: Any = None
        self._counts: Mapping[str, float] = {}
        self._move: Callable[[Any], Any] = _same
        self._local: LocalBatch | None = None
        # Whether attention was intercepted in a step, so that no further one has to show it.
        self._is_proven = False
        self._auto: AutoMemory | None = None
        # Public functions and samplers ask for the mesh from now on.
        activate(self.context)
        self._handle.add(self._deactivate)

    def _deactivate(self) -> None:
        # Another run may have begun meanwhile.
        if current_context() is self.context:
            activate(None)

    def install(
        self,
        module: nn.Module,
        *,
        gathers_parameters: bool = False,
        forget: Callable[[], None] | None = None,
        say: Callable[[str], None] | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        """Patches everything that a step of ``module`` may call.

        Args:
            module: The user's.
            gathers_parameters: Whether every forward gathers parameters from all ranks (ZeRO-3).
            forget: Called after each try of the model, for whoever keeps count of the module calls of a step.
            say: Tells the user where the model is split and which kernels compute attention; on rank 0 only.
            sharding: Of parameters, gradients and optimizer states; by default each process has all of them.

        Raises:
            UlyssesError: For a model that cannot be made exact.
        """
        self._module = module
        self._handle.add(install_interceptors(self.context, module, gathers_parameters).remove)
        check = partial(check_backward, self.context)
        # First, since the others are collectives.
        self.turns.calls.insert(0, check)
        self._handle.add(partial(self.turns.calls.remove, check))
        # Before plans that are chosen later, which are taken off before it.
        parts = self.settings.memory
        if parts != "auto" and parts.is_on:
            self._handle.add(memory.install(self.context, module, parts, forget, say).remove)
        self._handle.add(self._choice.install(module, forget).remove)
        if parts == "auto":
            states = sharding or Sharding(0, 1)
            self._auto = AutoMemory(self.context, module, self._device, states, aside, forget, say)
            self._handle.add(self._auto.remove)
        self._choice.say = say or self._choice.say
        if say is not None:
            self.context.notes.of(KernelReport).say = say

    def close(self) -> None:
        """Puts everything back that was patched; closing twice does nothing."""
        self._handle.remove()

    @contextmanager
    def installed(self, module: nn.Module) -> Iterator[SequenceParallel]:
        """`install` and `close`."""
        try:
            self.install(module)
            yield self
        finally:
            self.close()

    def loader(
        self, dataloader: Any, now: Callable[[], Clock], limit: Callable[[], float], prepare: Callable[[Any], Any]
    ) -> SeededLoader:
        """A dataloader whose random numbers a group shares, and that counts a step's targets ahead.

        Args:
            dataloader: The user's, with its sampler in place.
            now: Tells where the run stands.
            limit: Training batches of an epoch that will be used; infinite if that is unknown.
            prepare: Turns a batch into the one that `receive` will see.
        """
        looks_ahead = self.settings.loss_weighting == "tokens"
        return self._pipeline.wrap(dataloader, now, looks_ahead=looks_ahead, limit=limit, prepare=prepare)

    @property
    def batches(self) -> RunningDigest:
        """The hash of all batches that were received, the same on all ranks of a group."""
        return self._pipeline.same.running

    @property
    def turns(self) -> BackwardTurns:
        """Called in each backward before attention exchanges gradients."""
        return self.context.notes.of(BackwardTurns)

    @property
    def local(self) -> LocalBatch:
        """The batch that was received last, cut for this rank."""
        assert self._local is not None
        return self._local

    def split_of(self, kind: str) -> str:
        """Where steps of a kind, such as ``"train"``, are split: ``"batch"`` or ``"blocks"``."""
        plan = self._choice.plan(kind)
        return "batch" if plan is None or not plan.split else "blocks"

    def receive(
        self,
        batch: Any,
        clock: Clock,
        move: Callable[[Any], Any] | None = None,
        change: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Cuts a whole batch: the one that the following step runs on.

        Args:
            batch: The same on every rank of a group.
            clock: Where the run stands.
            move: Moves a batch to the device.
            change: What the user's hooks make of the whole batch before it is cut.

        Returns:
            The batch for the module.

        Raises:
            UlyssesError: If the batch is not understood for certain, or ranks hold different ones.
        """
        if change is not None:
            with self._pipeline.drawing("batch_to_device", clock):
                batch = change(batch)
        self._batch, self._move = batch, move or _same
        whole, inputs = self._cut(clock)
        with self._pipeline.drawing("batch_to_device", clock):
            self._choice.prepare(clock.kind, whole, self._move)
        return inputs

    def _cut(self, clock: Clock) -> tuple[WholeBatch, Any]:
        whole = self._pipeline.read(self._batch, clock)
        with self._pipeline.drawing("batch_to_device", clock):
            inputs, self._local = self._pipeline.cut(whole, clock.is_training, self._move, self.weights.settled)
        self._counts = whole.counts_of_group()
        return whole, inputs

    def try_step(self, clock: Clock, step: Callable[[Any], Any], inputs: Any) -> Any:
        """Tries a step on a few tokens of its batch before it runs; a collective, once for each kind of step.

        A loss that slices do not add up to is refused in `weigh` and `backward`, after checks that can say more of it.

        Args:
            clock: Where the run stands.
            step: Calls the user's step on a batch.
            inputs: What `receive` returned.

        Returns:
            The batch for the module: ``inputs``, or all of it where the model must be split inside.

        Raises:
            UlyssesError: On every rank, if ``targets`` names another tensor than the one that holds them, or the step
                cannot be split.
        """
        if self._choice.choose(clock, step):
            # What the user's hooks changed when the batch was moved for the first time stays as it is.
            with state_kept(self._module):
                inputs = self._cut(clock)[1]
        elif clock.is_training:
            fill_mask(self.local, self.weights.settled or "")
        if self._auto is not None and self._module.training:
            self._auto.prepare(self.local, step, inputs, self._choice.plan(clock.kind))
        return inputs

    @contextmanager
    def step(self, clock: Clock, name: str) -> Iterator[None]:
        """Around a step on the batch that was received.

        Args:
            clock: Where the run stands.
            name: Of the step, such as ``"training_step"``.

        Raises:
            UlyssesError: If the model cannot be split, or none of its attention was intercepted.
        """
        self.context.use(self._choice.plan(clock.kind), is_proven=clock.kind in self._choice.proven)
        if clock.is_training:
            self.weights.enter_epoch(clock.epoch)
            self.weights.begin(self._counts, self._pipeline.take())
            if clock.is_automatic:
                self.weights.check_boundary(clock.is_boundary)
        suspensions = self.context.suspensions
        self._clock = clock
        with (
            self._pipeline.drawing(name, clock),
            self.context.step(self.local),
            self._logged(clock),
        ):
            try:
                yield
            except Exception as failure:
                # No other type: a run may wait for one of its own, or for a device that is out of memory.
                note = self._choice.advice
                if note is not None and hasattr(failure, "add_note") and not isinstance(failure, UlyssesError):
                    failure.add_note(note)
                raise
            if self.context.plan is not None or not self._is_proven:
                self._is_proven = check_intercepted(self.context, name, type(self._module).__name__, suspensions)

    def _logged(self, clock: Clock) -> AbstractContextManager[None]:
        if self.context.plan is not None:
            return nullcontext()
        return self._choice.logged.exchanged(self._module, clock.kind, self.local, self._counts, self.weights.settled)

    def weigh(self, loss: Tensor) -> Tensor:
        """The loss to back-propagate on this rank, from the mean that the module returned; see `loss.token_mean`.

        Raises:
            UlyssesError: If the loss cannot be told to be a mean over known targets.
        """
        clock = self._clock
        try:
            return self.weights.apply(loss, self.local, clock.accumulate, clock.is_automatic)
        except UlyssesError as error:
            raise explained(error, self._choice.found) from None

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Around a backward, in which activation checkpointing calls attention again.

        Raises:
            UlyssesError: If slices do not add up to the loss.
        """
        with self.context.backward(self.local):
            yield
            if self._choice.found is not None:
                raise self._choice.found
            self._choice.advice = None

    def stepped(self) -> None:
        """After the optimizer has stepped."""
        self.weights.stepped()
        self._pipeline.stepped()

    def join(self, output: Any) -> Any:
        """Every sequence of a step's nested output joined, unless a plan has joined it already."""
        return output if self.context.is_joined else join_outputs(output, self.local, self.mesh)
