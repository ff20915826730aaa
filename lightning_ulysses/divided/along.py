"""Functions along dimensions: by themselves on slices where these do not carry the sequence, else sums over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lightning_ulysses.divided.pointwise import on_slices
from lightning_ulysses.divided.tensor import Divided, Division, name_of, rule
from lightning_ulysses.exchange.cut_and_join import sum_over_ranks

# Where functions take their dimension, and what it is by default; None for all of them, "" for a must.
_DIM: dict[str, tuple[int, Any]] = {
    **dict.fromkeys(("sum", "mean", "nansum", "amax", "amin", "all", "any", "max", "min"), (1, None)),
    **dict.fromkeys(("logsumexp", "softmax", "log_softmax", "softmin", "cumsum", "cumprod", "flip"), (1, "")),
    **dict.fromkeys(("count_nonzero", "median", "prod", "argmax", "argmin"), (1, None)),
    **dict.fromkeys(("norm", "vector_norm"), (2, None)),
    **dict.fromkeys(("narrow", "select", "index_select", "gather"), (1, "")),
    **dict.fromkeys(("sort", "argsort", "glu"), (1, -1)),
    **dict.fromkeys(("topk",), (2, -1)),
    **dict.fromkeys(("unbind",), (1, 0)),
    **dict.fromkeys(("chunk", "split", "tensor_split", "split_with_sizes"), (2, 0)),
    **dict.fromkeys(("normalize", "cosine_similarity"), (2, 1)),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "T", "mT", "t"), (-1, "")),
}  # fmt: skip
# Along the sequence as well, since sums of slices add up.
_SUMS = {"sum", "mean", "nansum", "count_nonzero"}
_MOVES = {name for name, (index, _) in _DIM.items() if index == -1}


def sum_of(part: Tensor, division: Division) -> Tensor:
    """Adds up what ranks have of a sum, with gradients; in float32 for half precision."""
    assert division.mesh.sp_group is not None
    precise = part.float() if part.is_floating_point() and part.dtype.itemsize < 4 else part
    return sum_over_ranks(precise, division.mesh.sp_group)


@rule(*_DIM)
def _along(func: Any, args: Any, kwargs: Any) -> Any:
    name, x = name_of(func).strip("_"), args[0] if args else kwargs.get("input")
    if not isinstance(x, Divided) or kwargs.get("out") is not None:
        return NotImplemented
    if name in _MOVES:
        return _by_itself(func, args, kwargs, x)
    index, default = _DIM[name]
    given = kwargs.get("dim", kwargs.get("axis", kwargs.get("dims", args[index] if len(args) > index else default)))
    if isinstance(given, Tensor):
        # The larger one of two tensors.
        return on_slices(func, args, kwargs)
    if given is None or given == ():
        dims = set(range(x.dim()))
    else:
        several = (given,) if isinstance(given, int) else given
        if not isinstance(several, (tuple, list, torch.Size)) or isinstance(given, bool):
            return NotImplemented
        # Dimensions one after the other, as in x.flip(0, 1).
        extra = args[index + 1 :] if name == "flip" else ()
        dims = {dim % x.dim() for dim in (*several, *extra)}
    if x.division.dim not in dims:
        return _by_itself(func, args, kwargs, x)
    return _sum(name, x, dims, kwargs, args[2:]) if name in _SUMS else NotImplemented


def _sum(name: str, x: Divided, dims: set[int], kwargs: Any, rest: Any) -> Any:
    keepdim, division = kwargs.get("keepdim", rest[0] if rest else False), x.division
    if name == "count_nonzero":
        return sum_of(x.local.ne(0).sum(sorted(dims)), division)
    is_whole_number = not x.dtype.is_floating_point and not x.dtype.is_complex
    dtype = kwargs.get("dtype") or (torch.int64 if is_whole_number and name == "sum" else x.dtype)
    if name == "mean" and not dtype.is_floating_point:
        return NotImplemented
    precise = torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype
    part = (torch.nansum if name == "nansum" else torch.sum)(x.local, sorted(dims), keepdim=keepdim, dtype=precise)
    total = sum_of(part, division)
    if name == "mean":
        count = 1
        for dim in dims:
            count *= x.shape[dim]
        total = total / count
    return total.to(dtype)


def _by_itself(func: Callable[..., Any], args: Any, kwargs: Any, x: Divided) -> Any:
    """Runs ``func`` on slices, and finds by shapes where the sequence is in what it returns."""
    division = x.division

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, Divided):
            return leaf.local
        # An index of the same rank; it belongs to tokens.
        if isinstance(leaf, Tensor) and leaf.dim() == x.dim() and leaf.shape[division.dim] == division.size:
            return division.cut(leaf, division.dim)
        return leaf

    others = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor) and leaf is not x]
    for other in others:
        is_alike = other.dim() == x.dim() and other.shape[division.dim] == division.size
        if isinstance(other, Divided):
            is_alike = other.dim() == x.dim() and other.division == division
        # An index of another dimension is no token's: (n,).
        if not is_alike and (isinstance(other, Divided) or other.dim() != 1):
            return NotImplemented
    dims = _dims_of_answer(func, args, kwargs, division)
    if dims is None:
        return NotImplemented
    new_args, new_kwargs = tree_map(cut, (args, kwargs))
    leaves, spec = tree_flatten(func(*new_args, **new_kwargs))
    found = [
        Divided(leaf, division.at(dim)) if dim is not None else leaf for leaf, dim in zip(leaves, dims, strict=True)
    ]
    return tree_unflatten(found, spec)


def _dims_of_answer(func: Any, args: Any, kwargs: Any, division: Division) -> list[int | None] | None:
    """For each tensor that ``func`` returns the dimension that grows with the sequence."""
    shapes = []
    for length in (2, 3):

        def shaped(leaf: Any, length: int = length) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            shape = list(leaf.shape)
            if isinstance(leaf, Divided) or (len(shape) > division.dim and shape[division.dim] == division.size):
                shape[division.dim] = length * len(division.rows)
            return torch.empty(shape, dtype=leaf.dtype, device="meta")

        new_args, new_kwargs = tree_map(shaped, (args, kwargs))
        leaves = tree_flatten(func(*new_args, **new_kwargs))[0]
        shapes.append([tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in leaves])
    found: list[int | None] = []
    for one, other in zip(*shapes, strict=True):
        if one is None or other is None:
            found.append(None)
            continue
        differ = [dim for dim, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
        if len(differ) != 1:
            return None
        found.append(differ[0])
    return found
