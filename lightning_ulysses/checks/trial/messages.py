"""What the trial of a step tells the user."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from lightning_ulysses.checks.trial.blocks import written
from lightning_ulysses.checks.trial.outputs import Change
from lightning_ulysses.checks.trial.verdict import Verdict
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.batch_keys import KEPT
from lightning_ulysses.geometry.joint import Halo
from lightning_ulysses.geometry.split_plan import SequencePlan
from lightning_ulysses.loss.targets import AmbiguousTargets


class NoTokenMean(UlyssesError):
    """For a step that is exact only where the sequence is whole before the loss; `fix` holds the plan."""


def refusal(verdict: Verdict, module: str, step: str, plan: SequencePlan | None) -> UlyssesError:
    """For a step that slices cannot add up to.

    Args:
        verdict: What the trial found.
        module: The user's class.
        step: The name of the step.
        plan: One that would join the sequence before the loss, if the model's blocks were found.
    """
    joined = _joined(plan)
    if verdict.moved is not None:
        return moved_error(verdict.moved, f"a {step} of {module} in which", f"to leave the model as it is, {joined}")
    what = f"whose slices add up to it only within {verdict.misfit:.1g}"
    if verdict.is_additive:
        weights = [round(weight, 4) for weight in verdict.weights]
        what = f"in which slices have the weights {weights}, while no tensor of the batch has such targets"
    if verdict.pooled is not None:
        what += f", first seen in {verdict.pooled.where}"
    return NoTokenMean(
        f"a loss of {module}.{step} that is no mean over tokens of the batch, {what}",
        "a mean over targets, each of which lies in one slice, marked in labels by ignore_index or by a loss_mask",
        f"{joined}; where the step shifts labels, use batch['shift_labels'] instead, and for a mean over some tokens "
        "put a mask over them into the batch as 'loss_mask'",
    )


def moved_error(change: Change, what: str, instead: str) -> NoTokenMean:
    """For a step that gives tokens other values on a slice.

    Args:
        change: What is another value.
        what: Begins the sentence.
        instead: What to do without changing the model.
    """
    return NoTokenMean(
        f"{what} {change.where} (or what is computed right before it) differs by {change.distance:.1g} between the "
        "whole sequence and a slice of it",
        "tokens that meet in intercepted attention only, with the same positions, random numbers and scales on a slice "
        "as on the whole",
        "take positions from lightning_ulysses.sequence_positions(x) in place of torch.arange(x.shape[1]), or put "
        "position_ids into the batch of a transformers model; draw with functions of torch; call "
        f"torch.nn.functional.scaled_dot_product_attention where attention is written out by hand; {instead}; else "
        "train without sequence parallelism (sp_size=1). check_model=False in the strategy switches this check off",
    )


def unfit(verdict: Verdict, module: str, step: str) -> UlyssesError:
    """For a plan of the user's own under which the step is another one."""
    instead = "split the model elsewhere, or leave plan out, so that a place is looked for"
    if verdict.found is not None:
        joints = written(SequencePlan({}, joints=dict.fromkeys(verdict.found.names, verdict.found.joint)))
        instead = f"add {joints} to the plan, so that it runs on more than a slice; or {instead}"
    if verdict.moved is not None:
        return moved_error(verdict.moved, f"a plan under which, in {step} of {module},", instead)
    return UlyssesError(
        f"a plan under which {step} of {module} is not that of one process ({verdict.reason})",
        "a plan that splits modules whose tokens meet in attention only, and joins behind each split",
        instead,
    )


def _joined(plan: SequencePlan | None) -> str:
    shown = written(plan) if plan is not None else "{'split': ..., 'join': ...}"
    settings = f"plan={shown} and loss_weighting='none' in the strategy"
    auto = "" if plan is None else "split='auto' or "
    return f"have the model split inside and joined before the loss: {auto}{settings}"


def why_blocks(verdict: Verdict, is_whole: bool) -> str:
    """Why the batch is not cut."""
    if is_whole:
        return "every rank gets the whole batch"
    if verdict.moved is not None:
        return f"on a slice of the batch, {verdict.moved.where} differ"
    if verdict.is_known:
        return "slices of the batch have losses that do not add up to that of the whole"
    return "the step does not run on a slice of the batch"


def chosen(kind: str, plan: SequencePlan, why: str, names: frozenset[str], is_choice: bool) -> str:
    """One line on a model that is split inside; ``is_choice`` tells that the batch could have been cut instead."""
    weighted = f", weighted by the targets of {sorted(names)[0].removesuffix(KEPT)!r}" if names else ""
    costs = "Before and after, every rank computes the whole sequence"
    if plan.is_divided:
        costs = "Before, every rank computes the whole sequence; after it each keeps to its slice"
    return (
        f"Ulysses splits {'/'.join(plan.split)} in steps of {kind!r}, since {why}. {costs}{weighted}; that costs its "
        "time and memory." + " split='batch' in the strategy forbids it." * is_choice
    )


def cut_with_joints(kind: str, plan: SequencePlan, kinds: Mapping[str, str]) -> str:
    """One line on a batch that is cut although tokens meet outside of attention."""
    return f"Ulysses cuts the batch in steps of {kind!r}. {joints_of(plan, kinds)}"


def joints_of(plan: SequencePlan, kinds: Mapping[str, str]) -> str:
    """What runs on more than a slice, and what that costs.

    Args:
        plan: The plan.
        kinds: The class of what each of its joints names.
    """
    halos = [f"{name} ({kinds[name]})" for name, joint in plan.joints.items() if isinstance(joint, Halo)]
    whole = [f"{name} ({kinds[name]})" for name, joint in plan.joints.items() if not isinstance(joint, Halo)]
    said = []
    if whole:
        said.append(
            f"Tokens meet outside of attention in {', '.join(whole)}: every rank runs that on the whole sequence, so "
            "its time and memory are not divided."
        )
    if halos:
        said.append(f"{', '.join(halos)} get the few tokens that they reach beside a slice from its neighbours.")
    return " ".join(said)


def unsplittable(module: str, fault: str, unread: UlyssesError | None, attends: bool) -> UlyssesError:
    """For a model that is to be split at its blocks, where none are found.

    Args:
        module: The user's class.
        fault: What differed when blocks were split, if any were found.
        unread: Why the batch cannot be cut instead; None if that was not to be.
        attends: Whether the step called attention, or another function that can be divided.
    """
    if unread is not None:
        blocks = f"; {module} is another step where its blocks are split ({fault})" if fault else ""
        if attends:
            return UlyssesError(f"{unread.got}{blocks}", unread.expected, unread.fix)
        return UlyssesError(
            f"{unread.got}; {module} calls no attention, nor another function that is divided over ranks{blocks}",
            f"{unread.expected}, or a model that makes a sequence, whose tokens meet in attention, of its batch",
            f"{unread.fix}; a model without a sequence, such as a network of convolutions, has nothing to split: train "
            "it without sequence parallelism (sp_size=1)",
        )
    return UlyssesError(
        f"{module} to split at its blocks, "
        + (
            f"whose blocks give another step when they are split ({fault})"
            if fault
            else "in which no module that attends has the sequence in its inputs and outputs"
        ),
        "a model whose tokens meet in attention only, in modules that take and return the sequence",
        "say where to split by plan={'split': ..., 'join': ...} in the strategy; in a Trainer, or set split='batch'",
    )


def advice(plan: SequencePlan | None) -> str:
    """A note on an error of a step that could not be tried."""
    return f"The step was given a slice of the sequence. If it runs on one process, {_joined(plan)}."


def explained(error: UlyssesError, found: UlyssesError | None) -> UlyssesError:
    """What a step raised, together with what the trial had found of it.

    Args:
        error: Raised by the step, or while its loss was weighted.
        found: The trial's refusal, if any.
    """
    if found is None or isinstance(error, AmbiguousTargets):
        # Where no tensor holds the targets, naming one would not help.
        return found or error
    if isinstance(found, NoTokenMean):
        return UlyssesError(error.got, error.expected, f"{error.fix}; or {found.fix}")
    return error


def warn_unchecked(reason: str, module: str, step: str) -> None:
    """Says once that nothing is known of the loss."""
    warnings.warn(
        f"NOT CHECKED: {step} of {module} could not be tried on a few tokens ({reason}). It runs as it is. "
        "`lightning-ulysses verify` compares it on a whole batch.",
        stacklevel=2,
    )


def warn_equal(module: str) -> None:
    """Says once that micro-batches and groups count alike, whatever the loss is a mean over."""
    warnings.warn(
        f"NOT CHECKED: which targets the loss of {module} is a mean over, since the step could not be tried on some "
        "rows or documents of its batch. Micro-batches and data-parallel groups have equal weights, as in plain "
        "Lightning. With one group and accumulate_grad_batches=1 that makes no difference.",
        stacklevel=2,
    )


def warn_logged(names: Sequence[str], module: str, kind: str) -> None:
    """Says once which values that a step logs are those of a slice."""
    warnings.warn(
        f"{module} logs {', '.join(map(repr, names))} in steps of {kind!r}, which slices of the sequence do not add up "
        "to: each rank logs that of its slice. Log a torchmetrics object, or the mean over targets that it is made of; "
        "split='blocks' in the strategy logs that of the whole sequence.",
        stacklevel=2,
    )
