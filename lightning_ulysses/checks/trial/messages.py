"""What the trial of a step tells the user."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from lightning_ulysses.checks.trial.verdict import WEIGHTS, Verdict
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.loss.targets import AmbiguousTargets


class NoTokenMean(UlyssesError):
    """For a step that is exact only where the sequence is whole before the loss; `fix` holds the plan."""


def refusal(verdict: Verdict, module: str, plan: Mapping[str, Any] | None) -> UlyssesError:
    """For a step that slices cannot add up to.

    Args:
        verdict: What the trial found.
        module: The user's class.
        plan: One that would join the sequence before the loss, if the model's blocks were found.
    """
    joined = _joined(plan)
    if verdict.moved is not None:
        return _moved(verdict.moved, module, joined)
    if verdict.is_additive and all(abs(weight - 1) <= WEIGHTS for weight in verdict.weights):
        return UlyssesError(
            "a loss that is a sum over tokens, or a sum divided by a number of its own",
            "the mean over the targets of this rank's slice; it is weighted by its part of the step's",
            "use reduction='mean', and leave num_items_in_batch out",
        )
    what = f"whose slices add up to it only within {verdict.misfit:.1g}"
    if verdict.is_additive:
        weights = [round(weight, 4) for weight in verdict.weights]
        what = f"in which slices have the weights {weights}, while no tensor of the batch has such targets"
    return NoTokenMean(
        f"a loss of {module}.training_step that is no mean over tokens of the batch, {what}",
        "a mean over targets, each of which lies in one slice, marked in labels by ignore_index or by a loss_mask",
        f"{joined}; or, for a mean over some tokens, put a mask over them into the batch as 'loss_mask'",
    )


def _moved(moved: tuple[int, str, float], module: str, joined: str) -> NoTokenMean:
    number, name, distance = moved
    what = {"q": "the queries", "k": "the keys", "v": "the values"}[name]
    return NoTokenMean(
        f"a training_step of {module} in which {what} of attention call {number} differ by {distance:.1g} between "
        "the whole sequence and a slice of it",
        "a step in which a token's queries, keys and values are its own: the same random numbers, positions and "
        "scales on a slice as on the whole",
        "draw noise in the shape of a sample and not of the slice, and take positions from "
        f"lightning_ulysses.sequence_positions(x); or {joined}",
    )


def _joined(plan: Mapping[str, Any] | None) -> str:
    shown = dict(plan) if plan is not None else "{'split': ..., 'join': ...}"
    settings = f"plan={shown} and loss_weighting='none' in the strategy"
    return f"have the model split inside and joined before the loss: {settings}"


def advice(plan: Mapping[str, Any] | None) -> str:
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


def warn_unchecked(reason: str, module: str) -> None:
    """Says once that nothing is known of the loss."""
    warnings.warn(
        f"The loss of {module}.training_step could not be tried on a few tokens ({reason}). "
        "`lightning-ulysses verify` compares it on a whole batch.",
        stacklevel=2,
    )
