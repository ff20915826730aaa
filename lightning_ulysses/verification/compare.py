"""Joins the slices that ranks recorded, and compares them with the whole sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_ulysses.geometry.distance import largest
from lightning_ulysses.verification.record import Call


def _unflatten(part: Tensor, dim: int, share: int) -> Tensor:
    """(..., B * S_r, ...) -> (..., B, S_r, ...); a single row stays as it is."""
    rows = part.shape[dim] // share
    return part if rows == 1 else part.unflatten(dim, (rows, share))


def join(parts: list[Tensor], whole: Tensor, shares: tuple[int, ...]) -> Tensor | None:
    """Joins the slices of all ranks into the shape of ``whole``.

    Args:
        parts: The tensor of each rank.
        whole: The tensor of one process.
        shares: S_r of each rank.

    Returns:
        The joined tensor. It has another shape than ``whole`` if the slices do not add up. None if no dimension is
        known to carry the sequence.
    """
    if any(part.dim() != whole.dim() for part in parts):
        return None
    dims = {dim for part in parts for dim in range(whole.dim()) if part.shape[dim] != whole.shape[dim]}
    if len(dims) != 1:
        return None
    dim = dims.pop()
    sizes = [part.shape[dim] for part in parts]
    if sum(sizes) == whole.shape[dim] and all(size % share == 0 for size, share in zip(sizes, shares, strict=True)):
        # In (B * S_r, ...), each rank holds its slices of all rows, so rows are taken apart before slices are joined.
        split = [_unflatten(part, dim, share) for part, share in zip(parts, shares, strict=True)]
        if split[0].dim() > whole.dim():
            return torch.cat(split, dim=dim + 1).flatten(dim, dim + 1)
    return torch.cat(parts, dim=dim)


def difference(parts: list[Tensor], whole: Tensor, shares: tuple[int, ...]) -> float | None:
    """The relative L2 difference between slices and the whole; None if they cannot be compared."""
    if whole.numel() <= 1:
        # A single number, such as a mean over the slice, cannot be joined.
        return None
    if all(part.shape == whole.shape for part in parts):
        return largest(_relative(part, whole) for part in parts)
    joined = join(parts, whole, shares)
    if joined is None:
        return None
    return _relative(joined, whole) if joined.shape == whole.shape else float("inf")


def _relative(value: Tensor, wanted: Tensor) -> float:
    value, wanted = value.double().nan_to_num(), wanted.double().nan_to_num()
    return float((value - wanted).norm() / wanted.norm().clamp_min(1e-30))


def gradient_errors(single: list[dict[str, Tensor]], split: list[dict[str, Tensor]]) -> dict[str, float]:
    """For each parameter, the largest relative difference of its gradient over all batches; see `ParityReport`."""
    errors: dict[str, float] = {}
    for wanted, found in zip(single, split, strict=False):
        floor = 0.01 * norm(wanted)
        for name, gradient in wanted.items():
            distance = float((found[name].double() - gradient.double()).norm())
            error = distance / max(float(gradient.double().norm()), floor, 1e-30)
            errors[name] = max(errors.get(name, 0.0), error) if error == error else float("nan")
    return errors


def norm(gradients: dict[str, Tensor]) -> float:
    """The 2-norm of all gradients together."""
    return float(sum(float(gradient.double().square().sum()) for gradient in gradients.values()) ** 0.5)


@dataclass
class Compared:
    """One module in both runs.

    Attributes:
        name: As in ``named_modules``.
        class_name: Its class.
        is_own: Whether that class is not one of torch's.
        inputs_differ: Whether any of its input tensors differs.
        outputs_differ: Whether any of its output tensors differs.
        restarts: Whether it got integers that start again on every rank, such as positions.
    """

    name: str
    class_name: str
    is_own: bool
    inputs_differ: bool = False
    outputs_differ: bool = False
    restarts: bool = False


def _restarts(parts: list[Tensor]) -> bool:
    """Whether every rank holds the same consecutive integers, although they should continue from rank to rank."""
    if any(part.is_floating_point() or part.dim() == 0 or part.shape[-1] < 2 for part in parts):
        return False
    length = min(part.shape[-1] for part in parts)
    counts = [part[..., :length] for part in parts]
    steps = counts[0].diff(dim=-1)
    return all(torch.equal(count, counts[0]) for count in counts) and bool((steps == 1).all())


@dataclass
class Comparison:
    """All modules, in the order in which they returned in one process."""

    modules: list[Compared] = field(default_factory=list)

    @property
    def first(self) -> Compared | None:
        """The first module whose output differs, whatever its inputs."""
        return next((module for module in self.modules if module.outputs_differ), None)

    @property
    def culprit(self) -> Compared | None:
        """The first module whose inputs agree and whose output differs."""
        return next((module for module in self.modules if module.outputs_differ and not module.inputs_differ), None)

    def clean(self) -> set[str]:
        """Names of the modules whose outputs agree."""
        return {module.name for module in self.modules if not module.outputs_differ}


def compare_calls(
    single: dict[str, Call], ranks: list[dict[str, Call]], shares: tuple[int, ...], tolerance: float
) -> Comparison:
    """Compares every module that ran in all processes."""
    comparison = Comparison()
    for name, call in single.items():
        split = [calls[name] for calls in ranks if name in calls]
        if len(split) < len(ranks):
            continue
        compared = Compared(name, call.class_name, call.is_own)
        for key, whole in call.inputs.items():
            parts = [other.inputs[key] for other in split if key in other.inputs]
            if len(parts) == len(split) and (difference(parts, whole, shares) or 0.0) > tolerance:
                compared.inputs_differ = True
                compared.restarts |= _restarts(parts)
        for key, whole in call.outputs.items():
            parts = [other.outputs[key] for other in split if key in other.outputs]
            if len(parts) == len(split) and (difference(parts, whole, shares) or 0.0) > tolerance:
                compared.outputs_differ = True
        comparison.modules.append(compared)
    return comparison
