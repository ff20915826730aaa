"""Which counts of targets weight the losses of some rows, or of some of the targets, in the loss of all."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_ulysses.checks.trial.replay import Recording, cut_dim, narrowed
from lightning_ulysses.checks.trial.verdict import INPUTS, SliceReport, fit, flat, judge
from lightning_ulysses.context import LocalBatch


def names_of_rows(whole: Recording, parts: Sequence[tuple[Recording, LocalBatch]], half: bool) -> frozenset[str] | None:
    """Tensors whose counts of targets are the weights with which losses of some rows add up to that of all.

    Args:
        whole: The run on all rows, or on all documents of one row.
        parts: Runs on some of them each, in order, with their counts.
        half: Whether the model computes in half precision.

    Returns:
        Their names; None if the loss of some rows has no gradient, as the mean over no target.
    """
    size, reports = flat(whole.gradients).norm(), []
    begins = [0] * len(whole.gradients)
    for part, local in parts:
        wanted, own = [], []
        for number, (a, b) in enumerate(zip(whole.gradients, part.gradients, strict=True)):
            # (B, ...) -> (B_r, ...), or (..., S, ...) -> (..., S_r, ...) of documents of one row.
            dim = cut_dim(a, b)
            if dim is not None:
                wanted.append(narrowed(a, dim, slice(begins[number], begins[number] + b.shape[dim])))
                own.append(b)
                begins[number] += b.shape[dim]
        reports.append(fit(wanted, own, size, local.counts, half))
    verdict = judge(reports, len(reports))
    return verdict.names if verdict.reason is None else None


def names_of_targets(
    whole: Recording, parts: Sequence[tuple[Recording, LocalBatch]], half: bool
) -> frozenset[str] | None:
    """`names_of_rows` of runs with some of the targets each; none for a loss with terms of other tokens."""
    wanted, own = flat(whole.gradients), torch.stack([flat(part.gradients) for part, _ in parts])
    size = wanted.norm()
    if not bool(own.isfinite().all()) or not float(size) or not bool(own.any(dim=1).all()):
        return None
    if float((own - own[0]).norm() / size) <= INPUTS:
        # The loss does not read them.
        return None
    if _has_others([part for part, _ in parts], parts[0][1]):
        return frozenset()
    # (parts, elements) and (elements,) -> (parts,)
    weights = torch.linalg.lstsq(own.T, wanted[:, None]).solution.flatten()
    misfit = float((wanted - weights @ own).norm() / size)
    reports = [
        SliceReport(local.counts, float(weight), misfit, is_half=half)
        for (_, local), weight in zip(parts, weights, strict=True)
    ]
    verdict = judge(reports, len(reports))
    return verdict.names if verdict.reason is None else None


def _has_others(parts: Sequence[Recording], local: LocalBatch) -> bool:
    """Whether tokens without a target have terms: the first targets alone give one to the last of the others."""
    rows, seq_len = local.rows, local.layout.seq_len
    calls = [each.gradients for each in parts]
    found = [each for each in zip(*calls, strict=True) if len(each[0]) == rows and seq_len in each[0].shape[1:-1]]
    if not found:
        return False
    # (B, ..., S, ...) -> (B * S,) behind the last attention, where tokens that come later change nothing.
    first, rest = (tensor.movedim(tensor.shape.index(seq_len, 1), 1).abs().flatten(2).sum(2) for tensor in found[-1])
    last = rest.flatten().nonzero()[-1:]
    return bool((first.flatten()[last] > INPUTS * first.max()).any())
