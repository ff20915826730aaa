"""What the loss that a step returns is, as far as the cross entropies computed in the step tell.

A mean over the slice's own targets is weighted exactly. A sum over them, or one divided by a number of the user's own,
would be weighted as if it were a mean.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_ulysses.context import LocalBatch
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.batch_keys import MASK_KEYS
from lightning_ulysses.loss.evidence import LossEvidence, TargetEvidence

SILENT, MEAN, SUM, OTHER = range(4)


def _valid(evidence: TargetEvidence) -> Tensor:
    assert evidence.target is not None
    return (evidence.target != evidence.ignore_index).flatten()


def _means(evidence: TargetEvidence, live: LocalBatch) -> Iterator[Tensor]:
    """The means over targets that can be made of one cross entropy."""
    assert evidence.value is not None
    value, valid = evidence.value.double().flatten(), _valid(evidence)
    if evidence.is_mean:
        yield value.squeeze()
    elif value.numel() == 1:
        yield value.squeeze() / valid.sum()
    else:
        shards = ((key, shard.flatten().to(value.device)) for key, shard in live.shards.items())
        masks = [s != 0 if key in MASK_KEYS else s != evidence.ignore_index for key, s in shards if key in live.counts]
        for kept in [valid, *masks]:
            if kept.shape == value.shape:
                yield value[kept].sum() / kept.sum()


def loss_form(loss: Tensor, name: str, live: LocalBatch) -> int:
    """Whether a rank's loss is a mean over targets, a sum of them over some number, or neither.

    Args:
        loss: What the module returned, one element.
        name: The tensor that holds the targets.
        live: The batch, with the evidence collected.

    Returns:
        ``MEAN``, ``SUM`` or ``OTHER``; ``SILENT`` where nothing can be said, as for a slice without targets, a loss
        without a cross entropy, one of several, or one with a router's loss.
    """
    noted = live.notes.of(LossEvidence)
    found = [evidence for evidence in noted.found if evidence.value is not None and evidence.target is not None]
    if len(found) != 1 or noted.has_whole_part or not live.counts.get(name) or not bool(torch.isfinite(loss)):
        return SILENT
    evidence, value = found[0], loss.detach().double().squeeze()
    assert evidence.value is not None
    halves = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in (loss, evidence.value))
    tolerance = 2e-2 if halves else 1e-5
    if any(bool((mean - value).abs() <= tolerance * value.abs()) for mean in _means(evidence, live)):
        return MEAN
    if evidence.is_mean or evidence.value.numel() > 1:
        return OTHER
    ratio = float(evidence.value.double().squeeze() / value)
    return SUM if round(ratio) >= 1 and abs(ratio - round(ratio)) <= 1e-4 * ratio else OTHER


def votes(form: int) -> list[int]:
    """What a rank puts into a minimum over all ranks, for `judge`."""
    return [int(form in (SILENT, SUM)), int(form != SUM), int(form in (SILENT, MEAN))]


def judge(minimum: list[int], name: str, count: float) -> str | None:
    """The verdict of all ranks.

    Args:
        minimum: Of the `votes`.
        name: The tensor that holds the targets.
        count: How many of them the whole step has.

    Returns:
        A warning, where the loss may be no mean over the targets.

    Raises:
        UlyssesError: If the loss is a sum on every rank that can tell.
    """
    may_be_sum, no_sum, is_mean = minimum
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
