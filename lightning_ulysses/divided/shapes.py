"""Functions that change shapes, and indices."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_ulysses.divided.along import sum_of
from lightning_ulysses.divided.tensor import Divided, Division, divided_in, joined, rule


@rule("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as")
def _reshape(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    if not isinstance(x, Divided):
        # Of the other tensor only the shape is asked.
        return x.reshape(args[1].shape)
    if any(isinstance(arg, torch.dtype) for arg in (*args, *kwargs.values())):
        return NotImplemented

    def shaped(leaf: Any) -> Any:
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta") if isinstance(leaf, Tensor) else leaf

    new_args, new_kwargs = tree_map(shaped, (args, kwargs))
    shape = func(*new_args, **new_kwargs).shape
    division = _in_shape(x, shape)
    if division is None:
        return NotImplemented
    own = list(shape)
    own[division.dim] = division.shares[division.mesh.sp_rank]
    # A slice of a longer sequence may have strides that a view of the whole would not have.
    return Divided(x.local.reshape(own), division)


def _in_shape(x: Divided, shape: torch.Size) -> Division | None:
    """How the tensor is divided in another shape; None where a slice would not be one there."""
    old, division, seq_len = x.shape, x.division, x.division.seq_len
    if seq_len is None:
        # Rows of several lengths stay one after the other.
        is_alike = shape[: division.dim + 1] == old[: division.dim + 1]
        return division if is_alike else None
    before, after = math.prod(old[: division.dim]) * len(division.rows), math.prod(old[division.dim + 1 :])
    for dim, size in enumerate(shape):
        rows = size // seq_len if seq_len else 0
        fits = math.prod(shape[:dim]) * rows == before and math.prod(shape[dim + 1 :]) == after
        if rows and size == rows * seq_len and fits:
            return Division(dim, division.rows[:1] * rows, division.mesh)
    return None


@rule("unsqueeze")
def _unsqueeze(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    dim = (args[1] if len(args) > 1 else kwargs["dim"]) % (x.dim() + 1)
    return Divided(x.local.unsqueeze(dim), x.division.at(x.division.dim + (dim <= x.division.dim)))


@rule("squeeze")
def _squeeze(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    given = args[1] if len(args) > 1 else kwargs.get("dim", tuple(range(x.dim())))
    dims = {dim % x.dim() for dim in ((given,) if isinstance(given, int) else given)}
    # The slice may be of one token, and the whole is not.
    dims = {dim for dim in dims if x.shape[dim] == 1}
    place = x.division.dim - sum(dim < x.division.dim for dim in dims)
    return Divided(x.local.squeeze(tuple(sorted(dims))), x.division.at(place))


@rule("expand", "expand_as")
def _expand(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    if not isinstance(x, Divided):
        return x.expand(args[1].shape)
    if kwargs:
        return NotImplemented
    other = args[1]
    sizes = args[1:] if isinstance(other, int) else other.shape if isinstance(other, Tensor) else other
    dim = len(sizes) - (x.dim() - x.division.dim)
    own = [-1 if place == dim else size for place, size in enumerate(sizes)]
    return Divided(x.local.expand(own), x.division.at(dim))


@rule("cat", "concat", "concatenate", "stack")
def _cat(func: Any, args: Any, kwargs: Any) -> Any:
    tensors, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else 0)
    first = next(divided_in(tensors))
    division, is_stack = first.division, func is torch.stack
    dim %= first.dim() + is_stack
    parts = []
    for tensor in tensors:
        if tensor.dim() != first.dim() or (dim == division.dim and not is_stack):
            return NotImplemented
        if isinstance(tensor, Divided):
            if tensor.division != division:
                return NotImplemented
            parts.append(tensor.local)
        elif tensor.shape[division.dim] == division.size:
            parts.append(division.cut(tensor, division.dim))
        else:
            return NotImplemented
    place = division.dim + (is_stack and dim <= division.dim)
    return Divided(func(parts, dim), division.at(place))


@rule("__getitem__")
def _get(func: Any, args: Any, kwargs: Any) -> Any:
    x, index = args
    if not isinstance(x, Divided):
        return NotImplemented
    if isinstance(index, Tensor) and index.dtype is torch.bool:
        return _masked(x, joined(index))
    if isinstance(index, tuple) and len(index) == 2 and all(isinstance(entry, Tensor) for entry in index):
        return _picked(x, *joined(index))
    entries = _entries(index, x.dim())
    if entries is None:
        return NotImplemented
    # The entry of each dimension; those of None make new ones.
    places = [place for place, entry in enumerate(entries) if entry is not None]
    place = places[x.division.dim]
    own = _own_index(entries[place], x.division)
    if own is None:
        return NotImplemented
    local, division = own
    found = x.local[(*entries[:place], local, *entries[place + 1 :])]
    dim = sum(not isinstance(entry, int) for entry in entries[:place])
    if division is None:
        return _token(found, x.division, dim)
    part = Divided(found, division.at(dim))
    # Fewer tokens than ranks are no sequence any more.
    return part.whole() if division.size < division.mesh.sp_size else part


def _masked(x: Divided, mask: Tensor) -> Any:
    """The tokens that a mask keeps: (B, S, ...) -> (N, ...)."""
    division = x.division
    if mask.shape != x.shape[: mask.dim()] or mask.dim() != division.dim + 1:
        return NotImplemented
    # (..., B * S) -> one line for each index before the divided dimension -> kept tokens before each bound
    counts = [
        F.pad(part.cumsum(0), (1, 0))[list(row)]
        for line in mask.reshape(-1, mask.shape[-1])
        for part, row in zip(line.split([row[-1] for row in division.rows]), division.rows, strict=True)
    ]
    rows = tuple(map(tuple, torch.stack(counts).tolist()))
    return Divided(x.local[division.cut(mask, mask.dim() - 1)], Division(0, rows, division.mesh))


def _picked(x: Divided, rows: Tensor, tokens: Tensor) -> Any:
    """One token of some rows each: (B, S, ...) -> (n, ...)."""
    (begin, end), division = x.division.spans[0], x.division
    is_simple = rows.dim() == tokens.dim() == 1 and {rows.dtype, tokens.dtype} <= {torch.int64, torch.int32}
    if division.dim != 1 or len(division.rows) != 1 or not is_simple or x.dtype is torch.bool:
        return NotImplemented
    tokens = torch.where(tokens < 0, tokens + division.size, tokens)
    if bool(((tokens < 0) | (tokens >= division.size)).any()):
        # No rank has such a token, and their sum would be zero.
        raise IndexError(f"tokens {tokens.tolist()} are out of bounds for dimension 1 of size {division.size}")
    is_here = ((tokens >= begin) & (tokens < end)).view(-1, *[1] * (x.dim() - 2))
    # A rank without tokens has a row of zeros to look at.
    local = x.local if end > begin else x.local.new_zeros(len(x), 1, *x.shape[2:])
    found = local[rows, (tokens - begin).clamp(0, local.shape[1] - 1)]
    return sum_of(torch.where(is_here, found, 0), division).to(x.dtype)


def _entries(index: Any, ndim: int) -> list[Any] | None:
    """An index with one entry for each dimension, beside those of None; None for one that holds more than slices."""
    entries = list(index) if isinstance(index, tuple) else [index]
    simple = (int, slice, type(None), type(Ellipsis))
    if any(not isinstance(entry, simple) or isinstance(entry, bool) for entry in entries):
        return None
    if Ellipsis not in entries:
        entries.append(Ellipsis)
    place = entries.index(Ellipsis)
    missing = ndim - sum(entry is not None for entry in entries) + 1
    return [*entries[:place], *[slice(None)] * missing, *entries[place + 1 :]]


def _own_index(entry: Any, division: Division) -> tuple[Any, Division | None] | None:
    """The same index on a slice, and the slices that it leaves; no slices where it picks one token."""
    if entry == slice(None):
        return entry, division
    if len(division.rows) != 1:
        return None
    bounds, ((begin, end),) = division.rows[0], division.spans
    if isinstance(entry, int):
        if not -division.size <= entry < division.size:
            raise IndexError(f"index {entry} is out of bounds for dimension {division.dim} of size {division.size}")
        first, last, step = entry % division.size, entry % division.size + 1, 1
    else:
        first, last, step = entry.indices(division.size)
    if step != 1:
        return None
    last = max(first, last)
    low, high = (min(max(edge - begin, 0), end - begin) for edge in (first, last))
    kept = tuple(min(max(bound, first), last) - first for bound in bounds)
    return slice(low, high), None if isinstance(entry, int) else Division(division.dim, (kept,), division.mesh)


def _token(found: Tensor, division: Division, dim: int) -> Any:
    """One token of the whole, which one rank has: (..., 1 or 0, ...) -> (...)."""
    # Backends add up no booleans.
    number = found.byte() if found.dtype is torch.bool else found
    return sum_of(number.sum(dim, dtype=number.dtype), division).to(found.dtype)
