"""Tries a step on a few tokens of the batch: in one process, on slices, and with the model split inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_ulysses import regions
from lightning_ulysses.attention.route import AttentionTally
from lightning_ulysses.batch.whole import WholeBatch
from lightning_ulysses.checks.step import check_joined
from lightning_ulysses.checks.trial.blocks import BlockFinder
from lightning_ulysses.checks.trial.narrowing import Attempt, agreed, narrow
from lightning_ulysses.checks.trial.outputs import Change
from lightning_ulysses.checks.trial.replay import Recorder, Recording, Rehearsal, Replay, early_outputs
from lightning_ulysses.checks.trial.samples import Inputs, Sample, Samples, is_tensor
from lightning_ulysses.checks.trial.sandbox import StepEnds, computes_precisely, repeatable, sandbox, state_kept
from lightning_ulysses.checks.trial.verdict import (
    HALF,
    LOGS,
    SliceReport,
    Verdict,
    compare,
    disagreement,
    judge,
    names_of_rows,
    part_of_loss,
)
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.batch_keys import BatchRules
from lightning_ulysses.geometry.split_plan import SequencePlan
from lightning_ulysses.interceptors.draw_table import DrawTable
from lightning_ulysses.loss.logged import Logged, LogRules, find_rules, numbers_of
from lightning_ulysses.regions.notes import RegionTally
from lightning_ulysses.upstream.meeting import all_arrive, arrive, next_meeting

Step = Callable[[Any], Any]

_NOT_FINITE = "a loss that is not finite"
# Seconds for which a rank whose step failed waits for the others.
_PATIENCE = 60.0


class StepTrial:
    """Tries one kind of step.

    Args:
        context: Where the step stands; P > 1.
        module: The user's LightningModule.
        device: Where it is.
        rules: How batches are read whose slices every rank gets.
        whole_rules: How batches are read of which every rank gets all.
    """

    def __init__(
        self,
        context: SequenceContext,
        module: nn.Module,
        device: torch.device,
        rules: BatchRules,
        whole_rules: BatchRules,
    ) -> None:
        self._context = context
        self._module = module
        self._device = device
        # Padding is nothing that the step in one process has.
        self._rules = replace(rules, pad_to_multiple_of=None)
        self._whole_rules = whole_rules
        self._samples: Samples | None = None
        self._first: Sample | None = None
        self._sample: Sample | None = None
        self._recorder: Recorder | None = None
        self._logged: dict[str, Any] = {}
        #: Plans that may divide the model, the one that divides most of it first.
        self.plans: tuple[SequencePlan, ...] = ()
        #: See `loss.logged`.
        self.log_rules = LogRules()
        #: What differed under the plan that was tried last.
        self.fault = ""

    @property
    def is_whole(self) -> bool:
        """Whether the batch cannot be cut."""
        return self._first is not None and self._first.part is None

    @property
    def attends(self) -> bool:
        """Whether the step called attention on the whole excerpt."""
        return self._recorder is not None and bool(self._recorder.recording.outputs)

    def prepare(self, batch: WholeBatch, move: Callable[[Any], Any]) -> None:
        """Takes an excerpt of a batch, and moves it to the device in all forms in which the step will be tried."""
        # Evaluation runs in inference mode, whose tensors no gradient can be taken of.
        with self._making():
            parts = self._rules, self._whole_rules, self._context.mesh, self._device
            self._samples = Samples(batch, *parts, move, self._module)
            self._first = self._samples.first()

    @contextmanager
    def _making(self) -> Iterator[None]:
        with torch.inference_mode(False), state_kept(self._module):
            yield

    def run(self, step: Step) -> Verdict:
        """Runs the step on the excerpt, whole and on this rank's slice; a collective.

        Args:
            step: Calls the user's step on inputs.
        """
        assert self._first is not None and self._samples is not None
        self._sample = self._first
        verdict = self._run(step, self._sample)
        # The batches of other groups may be longer, or short as they are: all ranks try again, or none.
        if not verdict.is_recorded and any(self._from_all(self._samples.has_more, None)):
            if self._samples.has_more:
                with self._making():
                    self._sample = self._samples.all()
            verdict = self._run(step, self._sample)
        self.plans = verdict.plans
        if verdict.is_recorded and verdict.moved is None and not verdict.fails:
            # Keys of another length were the same on the slice: they are no pooled tokens.
            self._take_memory()
            verdict = replace(verdict, names=narrow(verdict.names, partial(self._with_fewer, partial(self._run, step))))
        return verdict

    def _with_fewer(self, run: Callable[[Sample], Verdict], name: str) -> Attempt:
        assert self._samples is not None
        kept, attempt = (self._recorder, self.log_rules), Attempt()
        with self._making():
            sample = self._samples.fewer(name)
        if all(self._from_all(sample is not None, None)):
            assert sample is not None
            verdict = run(sample)
            attempt = Attempt(verdict.names if verdict.is_known else None, fails=not verdict.is_recorded)
        self._recorder, self.log_rules = kept
        return attempt

    def _take_memory(self) -> None:
        assert self._recorder is not None
        self._context.notes.of(AttentionTally).attends_memory |= self._recorder.sees_memory

    def _run(self, step: Step, sample: Sample) -> Verdict:
        counts = {} if sample.part is None else sample.part[1].counts
        plans: tuple[SequencePlan, ...] = ()
        report = SliceReport(counts, reason="")
        self._recorder, logged = None, Logged()
        failed: Exception | None = None
        try:
            with self._tried():
                plans = self._record(step, sample)
                if not self._is_finite:
                    report = SliceReport(counts, reason=_NOT_FINITE, is_recorded=False)
                    self._forget_loss()
                elif sample.part is not None:
                    report, logged = self._compare(step, sample.part)
        except Exception as failure:
            failed, fails = failure, self._recorder is not None
            # The step itself will say what a refusal says.
            reason = "" if isinstance(failure, UlyssesError) else repr(failure)
            report = SliceReport(counts, reason=reason, fails=fails, is_recorded=fails)
        assert self._samples is not None
        report = replace(report, is_empty=not self._samples.has_targets)
        reports, everyones_plans, everyones_logs = zip(*self._from_all((report, plans, logged), failed), strict=True)
        verdict = judge([*zip(reports, everyones_plans, strict=True)], self._context.mesh.sp_size)
        bound = HALF if any(report.is_half for report in reports) else LOGS
        self.log_rules = find_rules(everyones_logs, self._context.mesh.sp_size, bound, verdict.names)
        return verdict

    def _forget_loss(self) -> None:
        """Has a plan compared without it, which another group's batch may ask for."""
        assert self._recorder is not None
        self._recorder.recording.loss, self._recorder.recording.gradients = None, []

    @property
    def _is_finite(self) -> bool:
        loss = None if self._recorder is None else self._recorder.recording.loss
        return loss is None or bool(torch.isfinite(loss).all())

    def fits(self, step: Step, plan: SequencePlan) -> bool:
        """Whether a step whose model is split as ``plan`` says is that of one process; a collective."""
        assert self._sample is not None
        return self._rehearse(step, plan, self._sample.planned)[0] is None

    def rehearse(self, step: Step, plan: SequencePlan) -> Verdict:
        """Tries a plan of the user's on the excerpt; a collective.

        Args:
            step: Calls the user's step on inputs.
            plan: The plan. Without a join, slices have losses of their own.

        Raises:
            UlyssesError: On every rank, if the plan does not fit the model.
        """
        assert self._first is not None
        run = partial(self._rehearse_on, step, plan)
        verdict = run(self._first)
        return replace(verdict, names=narrow(verdict.names, partial(self._with_fewer, run)))

    def _rehearse_on(self, step: Step, plan: SequencePlan, sample: Sample) -> Verdict:
        error: str | None = None
        failed: Exception | None = None
        try:
            with self._tried(), self._context.cutting():
                self._record(step, sample)
                if not self._is_finite:
                    raise ValueError(_NOT_FINITE)
        except Exception as failure:
            failed, error = failure, repr(failure)
        errors = [each for each in self._from_all(error, failed) if each is not None]
        if errors:
            return Verdict(reason=errors[0], is_recorded=False)
        part = sample.part
        inputs = sample.planned if part is None else lambda: part
        fault, reports = self._rehearse(step, plan, inputs)
        if isinstance(fault, UlyssesError):
            raise fault
        if fault is not None:
            moved = fault if isinstance(fault, Change) else None
            return Verdict(moved=moved, reason=None if moved else str(fault), fails=True)
        return judge([(report, ()) for report in reports], self._context.mesh.sp_size)

    def _rehearse(
        self, step: Step, plan: SequencePlan, planned: Callable[[], Inputs]
    ) -> tuple[UlyssesError | Change | str | None, list[SliceReport]]:
        """What differs from the step of one process, or went wrong; and what losses of slices say."""
        assert self._recorder is not None
        context, recorder = self._context, self._recorder
        rehearsal = Rehearsal(context, recorder.recording)
        fault: UlyssesError | Change | str | None = None
        failed: Exception | None = None
        report = SliceReport({})
        tally = context.notes.of(AttentionTally)
        before = tally.attends_memory
        self._take_memory()
        try:
            with self._tried(), self._split_by(plan), state_kept(self._module):
                inputs, local = planned()
                draws = self._draws.replaying(recorder.drawn)
                with repeatable(self._device), draws, context.rehearsed(plan, local, rehearsal), torch.enable_grad():
                    self._differentiate(step, inputs, rehearsal.recording)
                    check_joined(context, "step", type(self._module).__name__)
                half = not computes_precisely(self._module)
                fault = disagreement(recorder, rehearsal, context.mesh, half, is_joined=bool(plan.join))
                if fault is None and not plan.join:
                    report = part_of_loss(recorder.recording, rehearsal, local.counts, half)
        except UlyssesError as error:
            failed = fault = error
        except Exception as failure:
            failed, fault = failure, repr(failure)
        faults, reports = zip(*self._from_all((fault, report), failed), strict=True)
        found = [each for each in faults if each is not None]
        if found:
            tally.attends_memory = before
        self.fault = getattr(found[0], "where", str(found[0])) if found else ""
        return found[0] if found else None, list(reports)

    def targets_by_rows(self, step: Step) -> frozenset[str] | None:
        """Tensors whose counts of targets weight the losses of some rows in the loss of all; a collective.

        Slices show nothing of a loss that needs the whole sequence, and one process has none. The module is in
        evaluation mode: dropout would draw other numbers for a row alone.

        Returns:
            Names of tensors; none of a loss that rows do not add up to; None if that could not be tried.
        """
        found = self._by_rows(step, None)
        return found.names if not found.names else narrow(found.names, partial(self._by_rows, step))

    def _by_rows(self, step: Step, name: str | None) -> Attempt:
        assert self._samples is not None
        attempt = Attempt()
        failed: Exception | None = None
        try:
            with self._tried(), state_kept(self._module):
                self._module.eval()
                runs = []
                for inputs in self._samples.by_rows(name):
                    runs.append((self._alone(step, *inputs).recording, inputs[1]))
                    # A step that fails on some rows alone takes them together.
                    attempt = Attempt(frozenset())
                if runs:
                    attempt = Attempt(names_of_rows(runs[0][0], runs[1:], not computes_precisely(self._module)))
        except Exception as failure:
            failed = failure
            attempt = Attempt(attempt.names, fails=attempt.names is None)
        return agreed(self._from_all(attempt, failed))

    @property
    def _draws(self) -> DrawTable:
        return self._context.notes.of(DrawTable)

    def _from_all(self, mine: Any, failed: Exception | None) -> list[Any]:
        # A rank that failed alone may have left the others in an exchange of the step, where they wait for it.
        meeting = next_meeting("trial")
        if failed is None:
            arrive(meeting)
        elif not all_arrive(meeting, _PATIENCE):
            raise failed
        everyone: list[Any] = [None] * self._context.mesh.world_size
        dist.all_gather_object(everyone, mine)
        return everyone

    @contextmanager
    def _tried(self) -> Iterator[None]:
        tallies = self._context.notes.of(AttentionTally), self._context.notes.of(RegionTally)
        before = tallies[0].calls, tallies[1].begun
        try:
            with torch.inference_mode(False), sandbox(self._module, self._device) as self._logged:
                yield
        finally:
            tallies[0].calls, tallies[1].begun = before

    @contextmanager
    def _split_by(self, plan: SequencePlan) -> Iterator[None]:
        if self._context.plan is plan:
            # The user's own, whose hooks are in place.
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
        return tuple(blocks.plans())

    def _alone(self, step: Step, inputs: Any, local: LocalBatch, blocks: BlockFinder | None = None) -> Recorder:
        recorder = Recorder(self._context, blocks)
        # One process takes over hardly any attention, whose gradients could be compared.
        is_split = self._context.mesh.sp_size > 1
        hooks = nullcontext() if is_split else early_outputs(self._module, recorder.recording.outputs)
        with hooks, self._context.alone(), self._draws.recording(recorder.drawn):
            self._try(step, inputs, local, recorder, recorder.recording)
        return recorder

    def _compare(self, step: Step, part: Inputs) -> tuple[SliceReport, Logged]:
        assert self._recorder is not None
        inputs, local = part
        replay = Replay(self._context, self._recorder.recording, local.layout.spans[self._context.mesh.sp_rank])
        with self._draws.replaying(self._recorder.drawn):
            self._try(step, inputs, local, replay, replay.recording)
        logged = Logged(self._recorder.recording.logged, replay.recording.logged, local.counts)
        half = not computes_precisely(self._module)
        return compare(self._recorder, replay, local, half), logged

    def _try(self, step: Step, inputs: Any, local: LocalBatch, trial: Any, recording: Recording) -> None:
        kept, streams = state_kept(self._module), repeatable(self._device)
        with kept, streams, self._context.tried(trial, local), torch.enable_grad():
            self._differentiate(step, inputs, recording)

    def _differentiate(self, step: Step, inputs: Any, recording: Recording) -> None:
        try:
            with recording.modules.watched(self._module):
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
            recording.differentiate(found)
