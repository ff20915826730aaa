"""Runs of a user's step in a sandbox: in one process, or with parts of the model on more than a slice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_ulysses import regions
from lightning_ulysses.attention.route import AttentionTally
from lightning_ulysses.checks.trial.blocks import BlockFinder
from lightning_ulysses.checks.trial.joints import Found, JointFinder
from lightning_ulysses.checks.trial.outputs import Call, Slice
from lightning_ulysses.checks.trial.replay import Recorder, Recording, early_outputs
from lightning_ulysses.checks.trial.samples import Sample, is_tensor
from lightning_ulysses.checks.trial.sandbox import StepEnds, repeatable, sandbox, state_kept
from lightning_ulysses.checks.trial.verdict import INPUTS, TOKENS_IN_HALF
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.joint import Joint
from lightning_ulysses.geometry.split_plan import SequencePlan
from lightning_ulysses.interceptors.draw_table import DrawTable
from lightning_ulysses.loss.logged import numbers_of
from lightning_ulysses.progress import unseen
from lightning_ulysses.regions.notes import JointTally, RegionTally
from lightning_ulysses.upstream.meeting import all_arrive, next_meeting

Step = Callable[[Any], Any]

# Seconds for which a rank whose step failed waits for the others, and one whose step has ended.
_PATIENCE, _LONG_PATIENCE = 60.0, 600.0


class TrialRuns:
    """Runs one kind of step.

    Args:
        context: Where the step stands; P > 1.
        module: The user's LightningModule.
        device: Where it is.

    Attributes:
        joints: Submodules that run on more than a slice, by name.
        given: The plan of the user's that is tried.
        advance: Told of each run.
    """

    def __init__(self, context: SequenceContext, module: nn.Module, device: torch.device) -> None:
        self._context = context
        self._module = module
        self._device = device
        self._logged: dict[str, Any] = {}
        self._recorder: Recorder | None = None
        self._finder = JointFinder(module)
        # Whether it is the batch that is cut.
        self._cuts = True
        self.joints: dict[str, Joint] = {}
        self.given: SequencePlan | None = None
        self.advance: Callable[[int], object] = unseen

    @property
    def cut_plan(self) -> SequencePlan | None:
        """The plan of a batch that is cut; None where all submodules run on slices."""
        if self.given is not None or not self.joints:
            return self.given
        return SequencePlan({}, joints=self._finder.patterns(self.joints), is_absolute=True)

    def kinds_of(self, plan: SequencePlan) -> dict[str, str]:
        """The class of what each joint of a plan names."""
        return {pattern: self._finder.kind(pattern) for pattern in plan.joints}

    @contextmanager
    def _joining(self) -> Iterator[None]:
        """Runs submodules on more than a slice, as was found or given."""
        plan = self.cut_plan
        with nullcontext() if plan is None else self._split_by(plan), self._context.cutting(plan):
            yield

    def _edges(self) -> list[nn.Module]:
        """The submodules behind which a loss of one slice depends on tokens of all."""
        plan = self.cut_plan if self._cuts else None
        return [] if plan is None or plan.join else regions.joint_modules(self._module, plan)

    @property
    def _draws(self) -> DrawTable:
        return self._context.notes.of(DrawTable)

    def _from_all(self, mine: Any, failed: Exception | None) -> list[Any]:
        # Others may still be in an exchange of the step, which no other collective must meet.
        seconds = _LONG_PATIENCE if failed is None else _PATIENCE
        if not all_arrive(next_meeting("trial"), seconds):
            raise failed or self._missing(seconds)
        everyone: list[Any] = [None] * self._context.mesh.world_size
        dist.all_gather_object(everyone, mine)
        return everyone

    def _missing(self, seconds: float) -> UlyssesError:
        return UlyssesError(
            f"a step of {type(self._module).__name__} that ended on this rank in its trial, and not on another one "
            f"within {seconds:.0f} seconds",
            "the same exchanges on every rank, forward and backward, whatever its slice holds and however long it is",
            "call gather_sequence and what is exchanged on every rank, or set split='blocks' in the strategy",
        )

    @contextmanager
    def _tried(self) -> Iterator[None]:
        notes = self._context.notes
        tallies = notes.of(AttentionTally), notes.of(RegionTally), notes.of(JointTally)
        before = tallies[0].calls, tallies[1].begun, tallies[2].calls
        try:
            with torch.inference_mode(False), sandbox(self._module, self._device) as self._logged:
                yield
        finally:
            self.advance(1)
            tallies[0].calls, tallies[1].begun, tallies[2].calls = before

    @contextmanager
    def _split_by(self, plan: SequencePlan) -> Iterator[None]:
        if plan is self.given:
            # Its hooks are in place.
            yield
            return
        handle = regions.install(self._context, self._module, plan)
        try:
            yield
        finally:
            handle.remove()

    def _record(self, step: Step, sample: Sample) -> tuple[SequencePlan, ...]:
        blocks = BlockFinder(self._module)
        try:
            recorder = self._alone(step, *sample.whole, blocks)
        finally:
            blocks.close()
        self._recorder = recorder
        return tuple(blocks.plans(self._context.mesh.sp_size))

    def _alone(self, step: Step, inputs: Any, local: LocalBatch, blocks: BlockFinder | None = None) -> Recorder:
        # Without blocks, it is the loss alone that is compared.
        recorder = Recorder(self._context, blocks, Recording(compares_modules=blocks is not None))
        # One process takes over hardly any attention, whose gradients could be compared.
        is_split = self._context.mesh.sp_size > 1
        hooks = nullcontext() if is_split else early_outputs(self._module, recorder.recording.outputs)
        with hooks, self._context.alone(), self._draws.recording(recorder.drawn):
            self._try(step, inputs, local, recorder, recorder.recording)
        return recorder

    def _look(self, part: Recording, cuts: Sequence[Slice], call: Call | None, half: bool) -> Found | None:
        assert self._recorder is not None
        whole, bound = self._recorder.recording, TOKENS_IN_HALF if half else INPUTS
        found = (self._finder.find(whole.modules, part.modules, cut, call, bound, self.joints) for cut in cuts)
        return next((each for each in found if each is not None), None)

    def _try(self, step: Step, inputs: Any, local: LocalBatch, trial: Any, recording: Recording) -> None:
        kept, streams = state_kept(self._module), repeatable(self._device)
        edges = recording.ending_at(self._edges())
        with kept, streams, edges, self._context.tried(trial, local), torch.enable_grad():
            self._differentiate(step, inputs, recording)

    def _differentiate(self, step: Step, inputs: Any, recording: Recording) -> None:
        try:
            with recording.modules.watched(self._module) if recording.compares_modules else nullcontext():
                output = step(inputs)
        except StepEnds as end:
            output = end.loss
        # Without its graph, on whose nodes DeepSpeed's hooks hold the engine.
        recording.returned = tree_map(lambda leaf: leaf.detach() if is_tensor(leaf) else leaf, output)
        loss = output.get("loss") if isinstance(output, dict) else output
        # Steps of evaluation often only log their loss.
        losses = [loss, *(value for name, value in self._logged.items() if "loss" in name)]
        recording.logged = numbers_of(self._logged)
        self._logged.clear()
        found = next((each for each in losses if isinstance(each, Tensor) and each.numel() == 1), None)
        if found is not None:
            with self._context.rehearsed_backward():
                recording.differentiate(found)
