"""Compares the loss that a step returns with the cross entropies computed in the step.

The weights are exact for a mean over the targets of the slice. A sum over targets, or a sum divided by a number of the
user's own, would be weighted wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_ulysses.context import LocalBatch
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.batch_keys import MASK_KEYS
from lightning_ulysses.loss.evidence import LossEvidence, TargetEvidence

# Results of `loss_form`.
SILENT, MEAN, SUM, OTHER = range(4)


def _valid(evidence: TargetEvidence) -> Tensor:
    assert evidence.target is not None
    # (...) -> (targets,)
    return (evidence.target != evidence.ignore_index).flatten()


def _means(evidence: TargetEvidence, live: LocalBatch) -> Iterator[Tensor]:
    """All means over targets that a module may have computed from one cross entropy."""
    assert evidence.value is not None
    value, valid = evidence.value.double().flatten(), _valid(evidence)
    if evidence.is_mean:
        yield value.squeeze()
    # A sum, which the module may have divided by the number of targets.
    elif value.numel() == 1:
        yield value.squeeze() / valid.sum()
    else:
        # One value for each token, of which the module may have taken the mean by a mask or by the labels.
        shards = ((key, shard.flatten().to(value.device)) for key, shard in live.shards.items())
        masks = [s != 0 if key in MASK_KEYS else s != evidence.ignore_index for key, s in shards if key in live.counts]
        for kept in [valid, *masks]:
            if kept.shape == value.shape:
                yield value[kept].sum() / kept.sum()


def loss_form(loss: Tensor, name: str, live: LocalBatch) -> int:
    """Whether a rank's loss is a mean over targets, a sum divided by some number, or neither.

    Args:
        loss: The loss that the module returned, one element.
        name: The tensor that holds the targets.
        live: The batch of the running step, with its evidence.

    Returns:
        ``MEAN``, ``SUM`` or ``OTHER``. ``SILENT`` if nothing can be said: for a slice without targets, without or with
        several cross entropies, or with an auxiliary loss of a router.
    """
    noted = live.notes.of(LossEvidence)
    found = [evidence for evidence in noted.found if evidence.value is not None and evidence.target is not None]
    if len(found) != 1 or noted.has_whole_part or not live.counts.get(name) or not bool(torch.isfinite(loss)):
        return SILENT
    evidence, value = found[0], loss.detach().double().squeeze()
    assert evidence.value is not None
    # The module may have computed its mean in half precision.
    halves = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in (loss, evidence.value))
    tolerance = 2e-2 if halves else 1e-5
    if any(bool((mean - value).abs() <= tolerance * value.abs()) for mean in _means(evidence, live)):
        return MEAN
    if evidence.is_mean or evidence.value.numel() > 1:
        return OTHER
    # A sum divided by an integer of the user's own, such as num_items_in_batch.
    ratio = float(evidence.value.double().squeeze() / value)
    return SUM if round(ratio) >= 1 and abs(ratio - round(ratio)) <= 1e-4 * ratio else OTHER


def votes(form: int) -> list[int]:
    """Three flags of a rank, as integers. `judge` gets their minimum over all ranks: whether all ranks set the flag."""
    return [int(form in (SILENT, SUM)), int(form != SUM), int(form in (SILENT, MEAN))]


def judge(minimum: list[int], name: str, count: float) -> str | None:
    """The joint verdict of all ranks.

    Args:
        minimum: The minimum of the `votes` over all ranks.
        name: The tensor that holds the targets.
        count: Number of targets in the whole step.

    Returns:
        A warning if the loss may not be a mean over the targets, else None.

    Raises:
        UlyssesError: If the loss is a sum on every rank that is not silent.
    """
    may_be_sum, no_sum, is_mean = minimum
    # All ranks see a sum or are silent, and at least one sees a sum.
    if may_be_sum and not no_sum:
        raise UlyssesError(
            "a loss that is a sum of cross entropies, or a sum divided by a number of its own",
            f"the mean over the targets of this rank's slice; it is weighted by its part of the step's {count:g}",
            "use reduction='mean', and leave num_items_in_batch out",
        )
    if is_mean:
        return None
    return (
        "The loss of training_step is not the mean of the cross entropy computed in it. It is weighted by the targets "
        f"of {name!r}, which is exact only if each of its parts is a mean over them. `lightning-ulysses verify` shows "
        f"whether it is; targets={name!r} in the strategy says that it is."
    )
