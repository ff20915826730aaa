"""Gradients of parameters in float32 from products in half precision, so that only their sum over tiles is rounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from lightning_ulysses.memory.tiles import GradientSums

# What linear layers and the layers of GPT-2 call; the weight of `addmm` has the inputs first.
_LINEAR, _ADDMM = F.linear, torch.addmm


def _product(a: Tensor, b: Tensor) -> Tensor:
    """(n, m), (n, k) -> (m, k) in float32, although both are in half precision."""
    if a.is_cuda and torch.version.cuda is not None:
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    return a.t().float() @ b.float()


class _Linear(torch.autograd.Function):
    """A linear layer that adds the gradients of its parameters to sums in float32, and gives autograd none."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        sums: GradientSums,
        places: tuple[int, int | None],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.transposed, ctx.sums, ctx.places = transposed, sums, places
        # Cast as mixed precision does; `weight` itself is the parameter.
        used = _cast(weight, x.dtype)
        own_bias = None if bias is None else _cast(bias, x.dtype)
        return F.linear(x, used.t() if transposed else used, own_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        place, of_bias = ctx.places
        used = _cast(weight, x.dtype)
        # (..., D_out) -> (n, D_out) and (..., D) -> (n, D)
        above, rows = gradient.flatten(0, -2), x.flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):
            ctx.sums.add_to(place, _product(rows, above) if ctx.transposed else _product(above, rows))
            if of_bias is not None:
                ctx.sums.add_to(of_bias, above.sum(0, dtype=torch.float32))
            of_x = F.linear(gradient, used if ctx.transposed else used.t()) if ctx.needs_input_grad[0] else None
        return of_x, None, None, None, None, None


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype)


class ExactSums(TorchFunctionMode):
    """While it is on, linear layers in half precision add what they give their parameters to ``sums`` unrounded.

    Others give autograd what they give it otherwise.

    Args:
        sums: Of all tiles.
        parameters: Stand for those of ``sums``, in their order.
    """

    def __init__(self, sums: GradientSums, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self._sums = sums
        self._places = {id(parameter): index for index, parameter in enumerate(parameters)}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replaces a linear layer whose weight is one of the parameters."""
        kwargs = kwargs or {}
        given = _read(func, args, kwargs)
        if given is None:
            return func(*args, **kwargs)
        x, weight, bias, transposed = given
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        place, of_bias = self._places.get(id(weight)), self._places.get(id(bias))
        is_foreign = bias is not None and bias.requires_grad and of_bias is None
        if place is None or is_foreign or dtype not in (torch.bfloat16, torch.float16) or x.dim() < 2:
            return func(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return _Linear.apply(x.to(dtype), weight, bias, transposed, self._sums, (place, of_bias))


def _read(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None, bool] | None:
    """Input, weight and bias of a linear layer, and whether its weight has the inputs first."""
    if func is _ADDMM and len(args) == 3 and not kwargs:
        bias, x, weight = args
        return (x, weight, bias, True) if bias.dim() == 1 else None
    if func is not _LINEAR:
        return None
    x, weight, bias = _arguments(*args, **kwargs)
    return (x, weight, bias, False) if isinstance(weight, Tensor) and weight.dim() == 2 else None


def _arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias
