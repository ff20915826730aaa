"""Records the outputs of all submodules in a run, and finds the first submodule in which two runs differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Recording:
    """The outputs of one run, in the order in which submodules finished: inner ones before outer ones.

    Attributes:
        outputs: (name, class, tensors) for each call of a submodule.
    """

    outputs: list[tuple[str, str, list[Tensor]]] = field(default_factory=list)


def tensors_in(value: Any) -> list[Tensor]:
    """All floating-point tensors in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [tensor for part in value.values() for tensor in tensors_in(part)]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in tensors_in(part)]
    return []


@contextmanager
def record(root: nn.Module) -> Iterator[Recording]:
    """Records the outputs of ``root`` and of all its submodules."""
    recording = Recording()
    handles = []
    for name, module in root.named_modules():

        def hook(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            # A clone, since a later operation may change the output in place.
            tensors = [tensor.detach().float().clone() for tensor in tensors_in(output)]
            recording.outputs.append((name, type(module).__name__, tensors))

        handles.append(module.register_forward_hook(hook))
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def token_dim(tensor: Tensor, tokens: int, rows: int) -> int | None:
    """The dimension of ``tensor`` that carries ``tokens``. None if there is not exactly one.

    A shape (rows * tokens, ...) counts as (rows, tokens, ...), see `by_token`. With several rows, a shape (tokens, ...)
    without rows is not accepted: a router may have selected as many tokens.
    """
    dims = [dim for dim, size in enumerate(tensor.shape) if size == tokens]
    if not dims and tensor.dim() and rows > 1 and tensor.shape[0] == rows * tokens:
        return 1
    if dims == [0] and rows > 1 and rows not in tensor.shape:
        return None
    return dims[0] if len(dims) == 1 else None


def by_token(tensor: Tensor, tokens: int, rows: int) -> Tensor | None:
    """``tensor`` with the dimension of tokens first, (tokens, ...); None if it has no such dimension."""
    dim = token_dim(tensor, tokens, rows)
    if dim is None:
        return None
    # `token_dim` counts rows and tokens in one dimension as two.
    if tensor.shape[dim : dim + 1] != (tokens,):
        # (rows * tokens, ...) -> (rows, tokens, ...)
        tensor = tensor.unflatten(0, (rows, tokens))
    # (..., tokens, ...) -> (tokens, ...)
    return tensor.movedim(dim, 0)


def differs(left: Tensor, right: Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by more than ``tolerance``, relative to their largest entry."""
    scale = max(float(left.abs().max()), float(right.abs().max()), 1e-30) if left.numel() else 1.0
    return left.shape != right.shape or not torch.allclose(
        left, right, rtol=0.0, atol=tolerance * scale, equal_nan=True
    )


def first_to_move(
    before: Recording, after: Recording, changed: int, tokens: int, rows: int, tolerance: float
) -> tuple[str, str] | None:
    """The first submodule whose output differs for some token other than the changed one.

    Args:
        before: A run.
        after: The same run with token ``changed`` replaced.
        changed: Index of the token.
        tokens: Number of tokens in both runs.
        rows: B.
        tolerance: The largest difference that counts as equal, relative to the largest entry.

    Returns:
        The name and class of the submodule, or None.
    """
    others = [token for token in range(tokens) if token != changed]
    for (name, kind, left), (_, _, right) in zip(before.outputs, after.outputs, strict=False):
        for one, other in zip(left, right, strict=False):
            a, b = by_token(one, tokens, rows), by_token(other, tokens, rows)
            if a is not None and b is not None and differs(a[others], b[others], tolerance):
                return name, kind
    return None


def first_to_depend_on_place(
    whole: Recording, part: Recording, span: slice, tokens: int, rows: int, tolerance: float
) -> tuple[str, str] | None:
    """The first submodule whose output for the tokens ``span`` is different if only these tokens run.

    Args:
        whole: A run on all tokens.
        part: A run on the tokens ``span`` alone, with their true positions.
        span: The range of these tokens.
        tokens: Number of tokens in the first run.
        rows: B.
        tolerance: The largest difference that counts as equal, relative to the largest entry.

    Returns:
        The name and class of the submodule, or None.
    """
    for (name, kind, left), (_, _, right) in zip(whole.outputs, part.outputs, strict=False):
        for one, other in zip(left, right, strict=False):
            a, dim = by_token(one, tokens, rows), token_dim(one, tokens, rows)
            if a is None or dim is None:
                continue
            count, flat = span.stop - span.start, one.shape[dim : dim + 1] != (tokens,)
            # Outputs whose shapes do not correspond are not compared.
            if other.dim() != one.dim() or other.shape[0 if flat else dim] != (rows * count if flat else count):
                continue
            # (rows * S_r, ...) -> (S_r, rows, ...), as `by_token` does
            b = other.unflatten(0, (rows, count)).movedim(1, 0) if flat else other.movedim(dim, 0)
            if differs(a[span], b, tolerance):
                return name, kind
    return None
