"""Tries a step on a few tokens of the batch: in one process, on slices, and with the model split inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_ulysses.attention.route import AttentionTally
from lightning_ulysses.batch.whole import WholeBatch
from lightning_ulysses.checks.step import check_joined
from lightning_ulysses.checks.trial.joints import Found, added, widest
from lightning_ulysses.checks.trial.narrowing import Attempt, agreed, narrow
from lightning_ulysses.checks.trial.outputs import Change, Slice
from lightning_ulysses.checks.trial.replay import Rehearsal, Replay
from lightning_ulysses.checks.trial.row_weights import names_of_rows, names_of_targets
from lightning_ulysses.checks.trial.runs import Step, TrialRuns
from lightning_ulysses.checks.trial.samples import Inputs, Sample, Samples
from lightning_ulysses.checks.trial.sandbox import computes_precisely, repeatable, state_kept
from lightning_ulysses.checks.trial.verdict import (
    HALF,
    LOGS,
    SliceReport,
    Verdict,
    compare,
    disagreement,
    judge,
    part_of_loss,
)
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.batch_keys import BatchRules
from lightning_ulysses.geometry.split_plan import SequencePlan
from lightning_ulysses.loss.logged import Logged, LogRules, find_rules

_NOT_FINITE = "a loss that is not finite"
# Kinds of submodules in which tokens meet, and the ways in which each of them may run.
_TRIES = 64


class StepTrial(TrialRuns):
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
        super().__init__(context, module, device)
        # Padding is nothing that the step in one process has.
        self._rules = replace(rules, pad_to_multiple_of=None)
        self._whole_rules = whole_rules
        self._samples: Samples  # Made by `prepare`.
        self._first: Sample | None = None
        self._sample: Sample | None = None
        #: Plans that may divide the model, the one that divides most of it first.
        self.plans: tuple[SequencePlan, ...] = ()
        #: See `loss.logged`.
        self.log_rules = LogRules()
        #: What differed under the plan that was tried last.
        self.fault = ""
        #: Whether attention is called inside of `joints`, and so not divided.
        self.joins_attention = False
        self._found: Found | None = None

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
        assert self._first is not None
        self._sample = self._first
        verdict = self._run(step, self._sample)
        # The batches of other groups may be longer, or short as they are: all ranks try again, or none.
        if not verdict.is_recorded and any(self._from_all(self._samples.has_more, None)):
            if self._samples.has_more:
                with self._making():
                    self._sample = self._samples.all()
            verdict = self._run(step, self._sample)
        self.plans = verdict.plans
        verdict = self._mended(verdict, partial(self._run, step, self._sample))
        if verdict.is_recorded and verdict.moved is None and not verdict.fails:
            # Keys of another length were the same on the slice: they are no pooled tokens.
            self._take_memory()
            verdict = replace(verdict, names=narrow(verdict.names, partial(self._with_fewer, partial(self._run, step))))
        return verdict

    def _mended(self, verdict: Verdict, run: Callable[[], Verdict]) -> Verdict:
        """Runs more and more submodules on more than a slice, until nothing differs or nothing is left to try."""
        first, kept, tries = verdict, self._recorder, 0
        while verdict.found is not None and self.given is None and tries < _TRIES:
            self.joints = added(self.joints, verdict.found)
            verdict, tries = run(), tries + 1
        # A step of evaluation may have no loss to judge by.
        is_judged = verdict.is_known or (self._recorder is not None and self._recorder.recording.loss is None)
        if tries and (verdict.moved is not None or verdict.fails or not is_judged):
            self.joints, self._recorder = {}, kept
            return first
        return verdict

    def _with_fewer(self, run: Callable[[Sample], Verdict], name: str) -> Attempt:
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
        self._recorder, self._found, logged = None, None, Logged()
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
        report = replace(report, is_empty=not self._samples.has_targets, found=self._found)
        reports, everyones_plans, everyones_logs = zip(*self._from_all((report, plans, logged), failed), strict=True)
        are_same = all(each == plans for each in everyones_plans)
        verdict = replace(judge(reports, self._context.mesh.sp_size), plans=plans if are_same else ())
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

    def fits(self, step: Step, plan: SequencePlan) -> SequencePlan | None:
        """The plan, with what runs on more than a slice, under which a step is that of one process; a collective.

        Args:
            step: Calls the user's step on inputs.
            plan: Where the model is split.

        Returns:
            None if it is another step, whatever runs on more than a slice.
        """
        assert self._sample is not None
        self._cuts = False
        if self._recorder is not None and self._recorder.recording.edges:
            # Behind a join, gradients pass through what runs on more than a slice.
            self._recorded(step, self._sample)
        before = self.joints
        self.joints = {name: joint for name, joint in before.items() if not self._finder.is_around(name, plan)}
        for _ in range(_TRIES):
            tried = replace(plan, joints=self._finder.patterns(self.joints)) if self.joints else plan
            fault, _, found = self._rehearse(step, tried, self._sample.planned)
            if fault is None:
                return tried
            if found is None:
                break
            self.joints = added(self.joints, found)
        self.joints = before
        return None

    def _recorded(self, step: Step, sample: Sample) -> list[str]:
        """Runs the step on all of a sample; a collective. What went wrong, on any rank."""
        error: str | None = None
        failed: Exception | None = None
        try:
            with self._tried(), self._context.cutting():
                self._record(step, sample)
                if not self._is_finite:
                    raise ValueError(_NOT_FINITE)
        except Exception as failure:
            failed, error = failure, repr(failure)
        return [each for each in self._from_all(error, failed) if each is not None]

    def rehearse(self, step: Step, plan: SequencePlan) -> Verdict:
        """Tries a plan of the user's on the excerpt; a collective.

        Args:
            step: Calls the user's step on inputs.
            plan: The plan. Without a join, slices have losses of their own.

        Raises:
            UlyssesError: On every rank, if the plan does not fit the model.
        """
        assert self._first is not None
        self.given = plan
        if not plan.split:
            with self._context.cutting():
                return self.run(step)
        run = partial(self._rehearse_on, step, plan)
        verdict = run(self._first)
        return replace(verdict, names=narrow(verdict.names, partial(self._with_fewer, run)))

    def _rehearse_on(self, step: Step, plan: SequencePlan, sample: Sample) -> Verdict:
        errors = self._recorded(step, sample)
        if errors:
            return Verdict(reason=errors[0], is_recorded=False)
        part = sample.part
        inputs = sample.planned if part is None else lambda: part
        fault, reports, found = self._rehearse(step, plan, inputs)
        if isinstance(fault, UlyssesError):
            raise fault
        if fault is not None:
            moved = fault if isinstance(fault, Change) else None
            return Verdict(moved=moved, reason=None if moved else str(fault), fails=True, found=found)
        return judge(reports, self._context.mesh.sp_size)

    def _rehearse(
        self, step: Step, plan: SequencePlan, planned: Callable[[], Inputs]
    ) -> tuple[UlyssesError | Change | str | None, list[SliceReport], Found | None]:
        """What differs from the step of one process, or went wrong; what losses of slices say; where tokens meet."""
        assert self._recorder is not None
        context, recorder = self._context, self._recorder
        rehearsal = Rehearsal(context, recorder.recording)
        fault: UlyssesError | Change | str | None = None
        failed: Exception | None = None
        report = SliceReport({})
        found: Found | None = None
        local: LocalBatch | None = None
        half = not computes_precisely(self._module)
        tally = context.notes.of(AttentionTally)
        before = tally.attends_memory
        self._take_memory()
        try:
            with self._tried(), self._split_by(plan), state_kept(self._module):
                inputs, local = planned()
                draws = self._draws.replaying(recorder.drawn)
                edges, split = rehearsal.recording.ending_at(self._edges()), context.rehearsed(plan, local, rehearsal)
                with repeatable(self._device), draws, edges, split, torch.enable_grad():
                    self._differentiate(step, inputs, rehearsal.recording)
                    check_joined(context, "step", type(self._module).__name__)
                fault = disagreement(recorder, rehearsal, local, context.mesh, half, is_joined=bool(plan.join))
                if fault is None and not plan.join:
                    report = part_of_loss(recorder.recording, rehearsal, local.counts, half)
        except UlyssesError as error:
            failed = fault = error
        except Exception as failure:
            failed, fault = failure, repr(failure)
        self.joins_attention = any(rehearsal.inside)
        call = fault.call if isinstance(fault, Change) else None
        if local is not None and (call is not None or failed is not None):
            found = self._look(rehearsal.recording, rehearsal.cuts(local), call, half)
        everyone = self._from_all((fault, report, found), failed)
        faults = [each for each in everyone if each[0] is not None]
        if faults:
            tally.attends_memory = before
        # The first change of any rank: later ones may follow from it.
        places = [getattr(each[0], "place", 0) for each in faults]
        showing = [each for each, place in zip(faults, places, strict=True) if place == min(places)]
        first, found = next((each[0] for each in showing), None), widest(each for *_, each in showing)
        self.fault = "" if first is None else getattr(first, "where", str(first))
        return first, [report for _, report, _ in everyone], found

    def targets_by_rows(self, step: Step) -> frozenset[str] | None:
        """Tensors whose counts of targets weight the losses of some rows in the loss of all; a collective.

        Slices show nothing of a loss that needs the whole sequence, and one process has none. The module is in
        evaluation mode: dropout would draw other numbers for a row alone.

        Returns:
            Names of tensors; none of a loss that rows do not add up to; None if that could not be tried.
        """
        name = self._samples.likeliest
        found = Attempt() if name is None else self._by_rows(step, name)
        # In a few tokens, fewer targets may tell no tensor from another.
        if found.names is None or len(found.names) != 1:
            found = self._by_rows(step, None)
        if found.names is None or found.breaks:
            return self._by_targets(step, found.names)
        return found.names if not found.names else narrow(found.names, partial(self._by_rows, step))

    def _company(self, runs: int) -> list[Inputs]:
        """What to run besides, so that all ranks run as often, as ZeRO-3 needs."""
        missing = max(self._from_all(runs, None)) - runs
        with self._making():
            return [self._samples.first().whole for _ in range(missing)]

    def _by_targets(self, step: Step, names: frozenset[str] | None) -> frozenset[str] | None:
        """The same for a step that does not run on some rows alone."""
        with self._making():
            samples = [*self._samples.by_targets()]
        company = self._company(3 * len(samples))
        try:
            with self._tried(), state_kept(self._module):
                self._module.eval()
                for whole, *parts in samples:
                    recording, *runs = (self._alone(step, *each).recording for each in (whole, *parts))
                    each = [*zip(runs, (local for _, local in parts), strict=True)]
                    found = names_of_targets(recording, each, not computes_precisely(self._module))
                    names = found if names is None else names | (found or frozenset())
                for inputs in company:
                    self._alone(step, *inputs)
        except Exception as failure:
            return agreed(self._from_all(Attempt(names), failure)).names
        return agreed(self._from_all(Attempt(names), None)).names

    def _by_rows(self, step: Step, name: str | None) -> Attempt:
        attempt, failed = Attempt(), None
        with self._making():
            samples = self._samples.by_rows(name)
        company = self._company(len(samples))
        try:
            with self._tried(), state_kept(self._module):
                self._module.eval()
                runs = []
                for inputs in samples:
                    runs.append((self._alone(step, *inputs).recording, inputs[1]))
                    # A step that fails on some rows alone takes them together.
                    attempt = Attempt(frozenset())
                if runs:
                    attempt = Attempt(names_of_rows(runs[0][0], runs[1:], not computes_precisely(self._module)))
                for inputs in company:
                    self._alone(step, *inputs)
        except Exception as failure:
            failed = failure
            attempt = Attempt(attempt.names, bool(samples) and attempt.names is None, attempt.names is not None)
        return agreed(self._from_all(attempt, failed))

    def _compare(self, step: Step, part: Inputs) -> tuple[SliceReport, Logged]:
        assert self._recorder is not None
        inputs, local = part
        rank, half = self._context.mesh.sp_rank, not computes_precisely(self._module)
        replay = Replay(self._context, self._recorder.recording, local.layout.spans[rank])
        cut = Slice.of(local.layout, local.rows, rank)
        try:
            with self._draws.replaying(self._recorder.drawn), self._joining():
                self._try(step, inputs, local, replay, replay.recording)
        except Exception:
            self._found = self._look(replay.recording, [cut], None, half)
            raise
        logged = Logged(self._recorder.recording.logged, replay.recording.logged, local.counts)
        report = compare(self._recorder, replay, local, half)
        self.joins_attention = any(replay.inside)
        if report.moved is not None and not report.moved.is_result:
            self._found = self._look(replay.recording, [cut], report.moved.call, half)
        return report, logged
