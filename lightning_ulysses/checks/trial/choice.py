"""Decides where the sequence of each kind of step is split: in the batch, or inside the model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_ulysses import regions
from lightning_ulysses.attention.route import AttentionTally
from lightning_ulysses.batch.clock import Clock
from lightning_ulysses.batch.pipeline import BatchPipeline
from lightning_ulysses.batch.whole import WholeBatch
from lightning_ulysses.checks.parameters import check_trained
from lightning_ulysses.checks.trial.messages import (
    advice,
    chosen,
    cut_with_joints,
    joints_of,
    refusal,
    unfit,
    unsplittable,
    warn_equal,
    warn_logged,
    warn_unchecked,
    why_blocks,
)
from lightning_ulysses.checks.trial.trial import Step, StepTrial
from lightning_ulysses.checks.trial.verdict import Verdict
from lightning_ulysses.config import UlyssesConfig, whole_rules
from lightning_ulysses.context import SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.split_plan import SequencePlan
from lightning_ulysses.loss.logged import LoggedValues
from lightning_ulysses.loss.weights import StepWeights
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.progress import progress

# Steps that are not named after their kind; those of Fabric are calls of a module.
_STEPS = {"train": "training_step", "validate": "validation_step", "forward": "forward", "evaluation": "forward"}


class SplitChoice:
    """Tries the first step of each kind, and has all of them split in the way that was exact.

    Args:
        settings: The strategy's settings.
        context: Where the step stands.
        pipeline: Reads batches.
        weights: Weights losses.
        device: Where the module is.
        refuses: Whether a step that is not exact is refused; else it is tried to weight its loss, and runs on.

    Attributes:
        found: What the trial found in the running step, raised where nothing can say more of it.
        logged: Exchanges what steps log whose batch is cut.
        advice: What to say if the step fails that could not be tried.
        proven: Kinds of steps that a trial has shown to be those of one process.
    """

    def __init__(
        self,
        settings: UlyssesConfig,
        context: SequenceContext,
        pipeline: BatchPipeline,
        weights: StepWeights,
        device: torch.device,
        refuses: bool = True,
    ) -> None:
        self._settings = settings
        self._context = context
        self._pipeline = pipeline
        self._weights = weights
        self._device = device
        self.logged = LoggedValues(context.mesh, device)
        self._handle = Handle()
        self._module: nn.Module = nn.Identity()
        self._forget: Callable[[], None] = _nothing
        self._trials: dict[str, StepTrial] = {}
        self._plans: dict[str, SequencePlan | None] = {}
        self._is_open = False
        self.found: UlyssesError | None = None
        self.advice: str | None = None
        self.proven: set[str] = set()
        self._refuses = refuses
        self.say: Callable[[str], None] = logging.getLogger("lightning_ulysses").info

    def install(self, module: nn.Module, forget: Callable[[], None] | None) -> Handle:
        """Begins to try steps of ``module``.

        Args:
            module: The user's.
            forget: Called after each try, for whoever keeps count of the module calls of a step.

        Returns:
            A handle whose ``remove()`` takes the hooks of all plans off.
        """
        settings = self._settings
        self._module, self._forget = module, forget or _nothing
        wanted = settings.check_model or settings.split == "blocks" or not self._refuses
        is_split = self._context.mesh.sp_size > 1
        self._is_open = wanted and (is_split or settings.plan is None)
        # A plan of the user's own says where to split: it is tried, and no other.
        if settings.plan is None and not is_split:
            self._pipeline.fall_back(whole_rules(settings.rules), always=False)
        elif self._is_open and settings.split != "batch" and settings.plan is None:
            self._pipeline.fall_back(whole_rules(settings.rules), always=settings.split == "blocks")
        return self._handle

    def plan(self, kind: str) -> SequencePlan | None:
        """Where the model is split in steps of a kind; None if the batch is cut."""
        return self._plans.get(kind, self._settings.plan)

    def prepare(self, kind: str, batch: WholeBatch, move: Callable[[Any], Any]) -> None:
        """Takes a few tokens of the first batch of a kind of step."""
        if self._is_open and kind not in self._plans:
            rules = self._settings.rules
            trial = StepTrial(self._context, self._module, self._device, rules, whole_rules(rules))
            trial.prepare(batch, move)
            self._trials[kind] = trial

    def choose(self, clock: Clock, step: Step) -> bool:
        """Tries a step on these tokens; a collective, once for each kind.

        Args:
            clock: Where the run stands.
            step: Calls the user's step on inputs.

        Returns:
            Whether the batch must be read again, since the model is split inside.

        Raises:
            UlyssesError: On every rank, if the batch cannot be cut nor the model split.
        """
        trial = self._trials.pop(clock.kind, None)
        if trial is None:
            return False
        if clock.is_training:
            check_trained(self._module)
        with progress(f"Trying a step of {clock.kind!r} on a few tokens", unit="runs") as trial.advance:
            return self._choose(clock, trial, step)

    def _choose(self, clock: Clock, trial: StepTrial, step: Step) -> bool:
        if self._context.mesh.sp_size == 1:
            self._weigh_rows(clock, trial, step)
            return False
        if self._settings.plan is not None:
            self._rehearse(clock, trial, step, self._settings.plan)
            return False
        with self._context.cutting():
            verdict = trial.run(step)
        self._forget()
        cuts = self._settings.split != "blocks" and not trial.is_whole
        if cuts and not verdict.has_targets and verdict.moved is None:
            # Nothing in this batch weighs anything: the next one is tried.
            return False
        by_targets = self._weights.by_targets
        is_mean = bool(verdict.names) if by_targets else verdict.averages
        is_exact = verdict.is_known and (is_mean or verdict.adds_up)
        # Where nothing is known, the batch is cut: the step may still run, or say itself what is wrong.
        stays = cuts and (is_exact or not verdict.shows_fault)
        # Attention inside of what runs on the whole sequence is not divided: better split the blocks.
        whole_attention = stays and trial.joins_attention
        cut_plan = trial.cut_plan
        stays = stays and (not whole_attention or self._settings.split == "batch")
        if not stays and verdict.is_recorded and self._settings.split != "batch":
            for plan in trial.plans:
                fitting = trial.fits(step, plan)
                self._forget()
                if fitting is not None and not (whole_attention and trial.joins_attention):
                    self._split_inside(clock, fitting, trial, step, verdict)
                    return True
        self._plans[clock.kind] = self._installed(cut_plan)
        if cuts and verdict.is_known:
            self.proven.add(clock.kind)
        if cut_plan is not None and self._context.mesh.rank == 0:
            self.say(cut_with_joints(clock.kind, cut_plan, trial.kinds_of(cut_plan)))
        self._pipeline.use(clock.kind, self._settings.rules)
        self.logged.of_kinds[clock.kind] = trial.log_rules
        if not cuts:
            unread = self._pipeline.unread.get(clock.kind)
            raise unsplittable(type(self._module).__name__, trial.fault, unread, trial.attends)
        if trial.log_rules.unknown and self._context.mesh.rank == 0:
            warn_logged(trial.log_rules.unknown, type(self._module).__name__, clock.kind)
        self._judge(clock, trial, verdict, is_exact)
        return False

    def _weigh_rows(self, clock: Clock, trial: StepTrial, step: Step) -> None:
        """Finds out how losses of micro-batches and groups add up where nothing is cut."""
        # Which rules read a batch is not decided: a later one may be read by the others, and nothing is cut.
        self._plans[clock.kind] = None
        if not self._weights.by_targets or self._weights.settled is not None:
            return
        names = trial.targets_by_rows(step)
        self._forget()
        if names is not None and clock.is_training:
            # Rows of one length have equal weights by their tokens, and so has a mean over rows.
            self._weights.settle_targets(frozenset() if names == {"tokens"} else names)
        elif names:
            self._weights.settle_evaluation(names)

    def _judge(self, clock: Clock, trial: StepTrial, verdict: Verdict, is_exact: bool) -> None:
        """What follows for a step whose batch is cut.

        Raises:
            UlyssesError: On every rank, if tokens get other values on a slice.
        """
        name, step = type(self._module).__name__, _step_of(clock)
        plan = trial.plans[0] if trial.plans and self._settings.split == "batch" else None
        if verdict.moved is not None:
            # What the step returns may be one value for each slice, and a run without attention says so itself.
            attends = trial.attends or self._context.notes.of(AttentionTally).calls
            if attends and not verdict.moved.is_result and self._refuses:
                raise refusal(verdict, name, step, plan)
        elif verdict.reason is not None:
            self._warn(clock, verdict, name, step)
            self.advice = advice(plan) if self._refuses else None
        elif clock.is_training:
            self._settle(verdict, is_exact, refusal(verdict, name, step, plan))
        else:
            self._weights.settle_evaluation(verdict.names)

    def _warn(self, clock: Clock, verdict: Verdict, name: str, step: str) -> None:
        # Evaluation needs no loss.
        is_open = clock.is_training or verdict.fails or not verdict.is_recorded
        if verdict.reason and is_open and self._context.mesh.rank == 0:
            warn_unchecked(verdict.reason, name, step)

    def _settle(self, verdict: Verdict, is_exact: bool, refused: UlyssesError) -> None:
        """Takes note of how losses of slices add up to that of the batch, or of why they do not."""
        if not is_exact:
            self.found = refused if self._refuses else None
        elif verdict.adds_up:
            self._weights.add_up()
        else:
            self._weights.settle_targets(verdict.names)

    def _rehearse(self, clock: Clock, trial: StepTrial, step: Step, plan: SequencePlan) -> None:
        """Tries the user's own plan.

        Raises:
            UlyssesError: On every rank, if the step is another one under it.
        """
        self._plans[clock.kind] = plan
        verdict = trial.rehearse(step, plan)
        self._forget()
        name, kind = type(self._module).__name__, _step_of(clock)
        moves = verdict.fails or verdict.moved is not None
        if moves and self._refuses:
            raise unfit(verdict, name, kind)
        if verdict.is_known and not verdict.fails:
            self.proven.add(clock.kind)
        if verdict.reason is not None:
            self._warn(clock, verdict, name, kind)
        elif plan.join:
            self._weigh_joined(clock, trial, step, is_token_mean=True)
        elif clock.is_training:
            is_mean = bool(verdict.names) if self._weights.by_targets else verdict.averages
            self._settle(verdict, is_mean or verdict.adds_up, refusal(verdict, name, kind, None))
        else:
            self._weights.settle_evaluation(verdict.names)

    def _installed(self, plan: SequencePlan | None) -> SequencePlan | None:
        """The same plan, with its hooks in place."""
        same = next((known for known in self._plans.values() if known == plan), None)
        if plan is not None and same is None:
            self._handle.add(regions.install(self._context, self._module, plan).remove)
            # Graphs that were compiled without the hooks would run on without them.
            torch.compiler.reset()
        return same or plan

    def _split_inside(self, clock: Clock, plan: SequencePlan, trial: StepTrial, step: Step, verdict: Verdict) -> None:
        self._plans[clock.kind] = self._installed(plan)
        self.proven.add(clock.kind)
        self._pipeline.use(clock.kind, whole_rules(self._settings.rules))
        names = self._weigh_joined(clock, trial, step, verdict.is_additive)
        if self._context.mesh.rank == 0:
            why, is_choice = why_blocks(verdict, trial.is_whole), self._settings.split == "auto"
            said = chosen(clock.kind, plan, why, names, is_choice)
            self.say(f"{said} {joints_of(plan, trial.kinds_of(plan))}".strip())

    def _weigh_joined(self, clock: Clock, trial: StepTrial, step: Step, is_token_mean: bool) -> frozenset[str]:
        """Finds out how losses of whole sequences add up over micro-batches and groups.

        Args:
            clock: Where the run stands.
            trial: Of this kind of step.
            step: Calls the user's step on inputs.
            is_token_mean: Whether slices have shown a mean over tokens.

        Returns:
            The tensors whose targets are the weights.
        """
        if not self._weights.by_targets:
            return frozenset()
        found = trial.targets_by_rows(step)
        self._forget()
        if found is None and (self._weights.settled is not None or not clock.is_training):
            return frozenset()
        if found is None and self._context.mesh.rank == 0:
            warn_equal(type(self._module).__name__)
        names = found or frozenset()
        if names == {"tokens"} and not is_token_mean:
            # All tokens give rows equal weights, as a mean over rows does, and slices do not show a mean over them.
            names = frozenset()
        if clock.is_training:
            self._weights.settle_targets(names)
        else:
            self._weights.settle_evaluation(names)
        return names


def _step_of(clock: Clock) -> str:
    return _STEPS.get(clock.kind, f"{clock.kind}_step")


def _nothing() -> None:
    return None
