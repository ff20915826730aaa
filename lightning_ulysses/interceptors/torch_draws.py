"""Has random draws of a slice be those of the whole sequence, so that one seed gives the same numbers for every P.

All ranks of a group have generators in the same state. Each draws for the whole sequence and takes its slice: exact on
any device, and the generators stay the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_ulysses.context import SequenceContext
from lightning_ulysses.interceptors.draw_table import Cut, DrawTable
from lightning_ulysses.patching.early_bound import Function
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.patching.outside_graphs import eager

# Draws with the given arguments, or returns None where nothing is cut.
Draw = Callable[..., Tensor | None]
Find = Callable[..., Cut | None]

_FILLS = (
    "bernoulli_",
    "cauchy_",
    "exponential_",
    "geometric_",
    "log_normal_",
    "normal_",
    "random_",
    "uniform_",
)


def _ordered_like(x: Tensor, shape: list[int]) -> Tensor:
    """An empty tensor whose dimensions lie in memory as those of one like ``x`` do: numbers are drawn in that order."""
    # The strides of a new tensor say nothing of a dimension of length 1, and those of an expanded one nothing at all.
    strides = x.stride() if 0 not in x.stride() else torch.empty_like(x).stride()
    order = sorted(range(x.dim()), key=lambda dim: -strides[dim])
    empty = torch.empty([shape[dim] for dim in order], dtype=x.dtype, device=x.device)
    # (in the order of memory) -> (in the order of x)
    return empty.permute([order.index(dim) for dim in range(x.dim())])


def _factory(original: Function, find: Find) -> Draw:
    """`torch.rand(2, 3)`, `torch.rand((2, 3))`, `torch.randint(5, size=(2, 3))`."""

    def draw(*args: Any, **kwargs: Any) -> Tensor | None:
        place = next((n for n, arg in enumerate(args) if isinstance(arg, (tuple, list))), None)
        spread = place is None and "size" not in kwargs
        size = kwargs["size"] if "size" in kwargs else args if place is None else args[place]
        shape = tuple(int(length) for length in size)
        cut = find(shape) if "out" not in kwargs else None
        if cut is None:
            return None
        whole = cut.whole(shape)
        if "size" in kwargs:
            kwargs = {**kwargs, "size": whole}
        else:
            args = (whole,) if spread or place is None else (*args[:place], whole, *args[place + 1 :])
        is_leaf = kwargs.pop("requires_grad", False)
        return cut.take(original(*args, **kwargs)).requires_grad_(is_leaf)

    return draw


def _like(original: Function, find: Find) -> Draw:
    """`torch.rand_like(x)`."""

    def draw(input: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        cut = find(tuple(input.shape))
        if cut is None:
            return None
        is_leaf = kwargs.pop("requires_grad", False)
        template = _ordered_like(input, cut.whole(input.shape))
        return cut.take(original(template, *args, **kwargs)).requires_grad_(is_leaf)

    return draw


def _fill(original: Function, find: Find) -> Draw:
    """`x.uniform_()`, `x.bernoulli_(p)`, where p may be a tensor."""

    def draw(self: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        cut = find(tuple(self.shape))
        if cut is None:
            return None

        def widen(value: Any) -> Any:
            is_slice = isinstance(value, Tensor) and value.shape == self.shape
            return cut.put(value.detach(), 0.0) if is_slice else value

        with torch.no_grad():
            whole = _ordered_like(self, cut.whole(self.shape))
            original(whole, *map(widen, args), **{name: widen(value) for name, value in kwargs.items()})
            own = cut.take(whole)
        return self.copy_(own)

    return draw


def _mask(original: Function, find: Find) -> Draw:
    """Dropout, as a product with what it makes of ones."""

    def draw(input: Tensor, p: float = 0.5, train: bool = True, inplace: bool = False, **kwargs: Any) -> Tensor | None:
        # torch.dropout has `train` where torch.nn.functional has `training`.
        cut = find(tuple(input.shape)) if kwargs.get("training", train) and p else None
        if cut is None:
            return None
        with torch.no_grad():
            ones = _ordered_like(input, cut.whole(input.shape)).fill_(1.0)
            own = cut.take(original(ones, p, True))
        return input.mul_(own) if inplace else input * own

    return draw


def _mapped(fill: float, dims: tuple[int, ...] | None = None) -> Callable[[Function, Find], Draw]:
    """What draws for each element, or each row, of its arguments; ``fill`` stands for other ranks' elements."""

    def make(original: Function, find: Find) -> Draw:
        def draw(*args: Any, **kwargs: Any) -> Tensor | None:
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            shape = tuple(torch.broadcast_shapes(*(value.shape for value in given)))
            # Rows are told from categories by their place.
            allowed = None if dims is None else dims if len(shape) == 2 else ()
            cut = find(shape, allowed) if "out" not in kwargs else None
            if cut is None:
                return None

            def widen(value: Any) -> Any:
                if not isinstance(value, Tensor) or value.shape != shape:
                    return value
                return cut.put(value, fill)

            return cut.take(original(*map(widen, args), **{name: widen(value) for name, value in kwargs.items()}))

        return draw

    return make


def _normal(original: Function, find: Find) -> Draw:
    sized, mapped = _factory(original, find), _mapped(1.0)(original, find)

    def draw(*args: Any, **kwargs: Any) -> Tensor | None:
        has_tensors = any(isinstance(value, Tensor) for value in (*args, *kwargs.values()))
        return (mapped if has_tensors else sized)(*args, **kwargs)

    return draw


def _functions() -> list[tuple[Any, str, Callable[[Function, Find], Draw]]]:
    functional: Any = torch.nn.functional
    rows = _mapped(1.0, dims=(0,))
    return [
        *((torch, name, _factory) for name in ("rand", "randn", "randint")),
        *((torch, name, _like) for name in ("rand_like", "randn_like", "randint_like")),
        (torch, "normal", _normal),
        (torch, "dropout", _mask),
        *((functional, name, _mask) for name in ("dropout", "dropout1d", "dropout2d", "dropout3d")),
        *((functional, name, _mapped(0.0)) for name in ("alpha_dropout", "feature_alpha_dropout")),
        *((owner, "bernoulli", _mapped(0.0)) for owner in (torch, Tensor)),
        *((owner, "multinomial", rows) for owner in (torch, Tensor)),
        *((Tensor, name, _fill) for name in _FILLS),
    ]


def _is_off(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this is dropout that drops nothing: it must not break a graph."""
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    return not p or not kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))


def _wrapped(context: SequenceContext, original: Function, name: str, kind: Callable[[Function, Find], Draw]) -> Any:
    def find(shape: tuple[int, ...], dims: Any = None) -> Cut | None:
        return context.notes.of(DrawTable).find(context, name, shape, dims)

    def alone(*args: Any, **kwargs: Any) -> Any:
        # Under a function mode, functions of torch.nn.functional call themselves by their names, and so `choose`.
        with context.plain():
            return original(*args, **kwargs)

    taken = kind(alone, find)
    is_dropout = "dropout" in name

    def draw(*args: Any, **kwargs: Any) -> Any:
        drawn = taken(*args, **kwargs)
        return alone(*args, **kwargs) if drawn is None else drawn

    outside = eager(draw)

    @functools.wraps(original)
    def choose(*args: Any, **kwargs: Any) -> Any:
        place = context.place
        if (place.batch is None and not place.takes_calls) or (is_dropout and _is_off(args, kwargs)):
            return original(*args, **kwargs)
        return outside(*args, **kwargs)

    return choose


def install(context: SequenceContext, early: dict[Function, Function]) -> Handle:
    """Patches the functions of torch that draw. Does nothing if P = 1.

    Inside compiled graphs a function breaks the graph; what a tensor's own method draws there is not changed.

    Args:
        context: Where the step stands.
        early: Takes the replacement of each function that may have been bound early.

    Returns:
        A handle whose ``remove()`` restores everything.
    """
    handle = Handle()
    if context.mesh.sp_size == 1:
        return handle
    # torch collects its own functions that make tensors when such a context is first used, and not these.
    with torch.device("cpu"):
        torch.empty(0)
    for owner, name, kind in _functions():
        original = getattr(owner, name)
        replacement = _wrapped(context, original, name, kind)
        handle.patch(owner, name, replacement)
        if owner is not Tensor:
            early[original] = replacement
    return handle
