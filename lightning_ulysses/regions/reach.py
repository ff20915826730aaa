"""How far a convolution or pooling of torch reaches along a dimension."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_ulysses.geometry.joint import Reach

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLINGS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def reach_of(module: nn.Module, dim: int, ndim: int, zeros: int = 0) -> Reach | None:
    """The tokens that one output token depends on; None where only the whole sequence will do.

    Args:
        module: Any.
        dim: The dimension that carries the sequence in its input, not negative.
        ndim: Dimensions of its input.
        zeros: How many zeros the caller has put before the sequence.

    Returns:
        The tokens beside its own. Output t belongs to token t.
    """
    # A class of the user's own may do more than torch's.
    kinds = [kind for kind in (*_CONVOLUTIONS, *_POOLINGS) if isinstance(module, kind)]
    if not kinds or type(module).forward is not kinds[0].forward or getattr(module, "return_indices", False):
        return None
    rank = int(kinds[0].__name__[-2])
    axis = dim - (ndim - rank)
    if axis < 0 or _at(module.stride, axis) != 1 or getattr(module, "padding_mode", "zeros") != "zeros":
        return None
    span = (_at(module.kernel_size, axis) - 1) * _at(getattr(module, "dilation", 1), axis)
    padding = module.padding
    # torch puts the smaller half before the sequence.
    own = span // 2 if padding == "same" else 0 if padding == "valid" else _at(padding, axis)
    before = own + zeros
    return Reach(before, span - before) if 0 <= before <= span else None


def _at(value: Any, axis: int) -> int:
    return int(value[axis]) if isinstance(value, (tuple, list)) else int(value)
