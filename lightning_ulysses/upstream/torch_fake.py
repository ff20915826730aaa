"""The private parts of torch's fake tensors that this package uses, pinned by a test."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager

# A view by what it does, but not by its schema.
_UNSAFE = frozenset({torch.ops.aten._unsafe_view.default})


def is_plain_view(func: Any, args: tuple[Any, ...], kwargs: Any) -> bool:
    """Whether an operator returns views of one fake tensor, whose shapes follow from numbers alone."""
    if kwargs or not (func.is_view or func in _UNSAFE):
        return False
    return type(args[0]) is FakeTensor and args[0].constant is None


def view_of(func: Any, args: tuple[Any, ...]) -> Any:
    """What `FakeTensorMode` returns for such an operator, in a fourth of the time: nothing is looked up.

    Source:
        torch ``_subclasses/fake_tensor.py``, ``FakeTensorMode._dispatch_impl``.
    """
    tensor = args[0]
    mode = tensor.fake_mode
    with in_kernel_invocation_manager(mode):
        found = func(*args)
    if isinstance(found, torch.Tensor):
        return FakeTensor(mode, found, tensor.fake_device)
    return [FakeTensor(mode, each, tensor.fake_device) for each in found]
