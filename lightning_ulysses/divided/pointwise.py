"""Functions of each element by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_ulysses.divided.tensor import Divided, changes_first, divided_in, name_of, of_slices, rule

# Functions, operators, copies and casts.
_POINTWISE = """
abs add addcdiv addcmul bitwise_and bitwise_not bitwise_or bitwise_xor ceil celu clamp clamp_max clamp_min clip copysign
cos cosh deg2rad digamma div divide elu eq erf erfc exp exp2 expm1 floor floor_divide fmax fmin fmod frac ge gelu
greater greater_equal gt hardshrink hardsigmoid hardswish hardtanh heaviside hypot isfinite isinf isnan le leaky_relu
lerp less less_equal lgamma log log10 log1p log2 log_sigmoid logaddexp logical_and logical_not logical_or logical_xor
logit logsigmoid lt masked_fill maximum minimum mish mul multiply nan_to_num ne neg negative not_equal polar pow rad2deg
reciprocal relu relu6 remainder round rsqrt rsub selu sgn sigmoid sign sin sinc sinh silu softplus softsign sqrt square
sub subtract tan tanh tanhshrink threshold true_divide trunc xlogy

and or xor invert radd rmul rdiv rtruediv truediv rfloordiv floordiv rpow rmod mod iadd isub imul itruediv idiv ipow ior
iand ixor pos ror rxor lshift rshift

clone contiguous detach float half bfloat16 double long int short byte bool type zeros_like ones_like empty_like
full_like alias positive data
"""


def on_slices(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Runs a function of each element on slices, with other tensors cut where they are broadcast along the sequence.

    Args:
        func: The function.
        args: Its arguments; at least one tensor in them is divided.
        kwargs: Its keyword arguments.

    Returns:
        What ``func`` returns of slices, and NotImplemented where tensors are divided differently.
    """
    aligned = align(args, kwargs)
    if aligned is NotImplemented:
        return NotImplemented
    (new_args, new_kwargs), ndim, first = aligned
    answer = func(*new_args, **new_kwargs)
    # Counted from behind, since shapes are broadcast from there.
    dim = ndim - (first.dim() - first.division.dim)
    return tree_map(
        lambda leaf: Divided(leaf, first.division.at(dim)) if isinstance(leaf, Tensor) else leaf,
        answer,
    )


def align(args: Any, kwargs: Any) -> Any:
    """The arguments with slices of all tensors, the rank of the broadcast shape, and a divided tensor of them."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    first = next(divided_in(tensors))
    division, ndim = first.division, max(tensor.dim() for tensor in tensors)
    behind = first.dim() - division.dim
    misfits = False

    def cut(leaf: Any) -> Any:
        nonlocal misfits
        if isinstance(leaf, Divided):
            misfits |= (leaf.dim() - leaf.division.dim, leaf.division.rows) != (behind, division.rows)
            return leaf.local
        if not isinstance(leaf, Tensor) or leaf.dim() < behind or leaf.shape[-behind] == 1:
            return leaf
        if leaf.shape[-behind] != division.size:
            misfits = True
            return leaf
        return division.cut(leaf, leaf.dim() - behind)

    new = tree_map(cut, (args, kwargs))
    return NotImplemented if misfits else (new, ndim, first)


@rule(*(name + end for name in _POINTWISE.split() for end in ("", "_")), "__rand__", "where", "fill_", "zero_", "copy_")
def _pointwise(func: Any, args: Any, kwargs: Any) -> Any:
    name = name_of(func)
    if kwargs.get("out") is not None or (name == "where" and len(args) + len(kwargs) < 3):
        return NotImplemented
    if not changes_first(name):
        return on_slices(func, args, kwargs)
    first = args[0]
    if not isinstance(first, Divided):
        return NotImplemented
    aligned = align(args, kwargs)
    if aligned is NotImplemented:
        return NotImplemented
    (new_args, new_kwargs), ndim, _ = aligned
    if ndim > first.dim():
        return NotImplemented
    first.local = func(*new_args, **new_kwargs)
    return first


@rule("to", "type_as")
def _cast(func: Any, args: Any, kwargs: Any) -> Any:
    # Of another tensor only the type is asked.
    answer, x = func(*of_slices(args), **of_slices(kwargs)), args[0]
    return Divided(answer, x.division) if isinstance(x, Divided) else answer


@rule("dropout")
def _dropout(func: Any, args: Any, kwargs: Any) -> Any:
    (x,) = divided_in(args, kwargs)
    given = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
    if not given.get("training", True) or not given.get("p", 0.5):
        return x
    # The draw is that of the whole sequence, so that every rank goes on with the same random numbers.
    kept = func(torch.ones((), dtype=x.dtype, device=x.device).expand(x.shape).contiguous(), given.get("p", 0.5))
    return on_slices(torch.mul, (x, kept), {})


@rule("layer_norm", "rms_norm")
def _norm(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    # Weight and bias belong to each token's own features.
    if len(list(divided_in(args, kwargs))) > 1 or x.division.dim >= x.dim() - len(shape):
        return NotImplemented
    return Divided(func(*of_slices(args), **of_slices(kwargs)), x.division)


@rule("linear", "matmul", "__matmul__", "mm", "bmm", "mv")
def _linear(func: Any, args: Any, kwargs: Any) -> Any:
    x, others = args[0], [*args[1:], *kwargs.values()]
    if not isinstance(x, Divided) or list(divided_in(others)) or x.division.dim == x.dim() - 1 or not others:
        return NotImplemented
    weight = others[0]
    if weight.dim() > 2 and (weight.dim() > x.dim() or x.division.dim != x.dim() - 2):
        return NotImplemented
    answer = func(x.local, *args[1:], **kwargs)
    return Divided(answer, x.division)
