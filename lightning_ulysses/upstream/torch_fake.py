"""The private parts of torch's fake tensors that this package uses, pinned by a test."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

# A view by what it does, but not by its schema.
_UNSAFE = frozenset({torch.ops.aten._unsafe_view.default})
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_UNKNOWN = ()


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
    if isinstance(found, Tensor):
        return _faked(found, mode, tensor.fake_device)
    return [_faked(each, mode, tensor.fake_device) for each in found]


class Answers:
    """What `FakeTensorMode` returns for operators: a third of the time for those that were asked the same before.

    The mode has a memory of its own, whose keys take longer to make than an answer.

    Source:
        torch ``_subclasses/fake_tensor.py``, ``FakeTensorMode._cached_dispatch_impl``.
    """

    def __init__(self) -> None:
        # The number of the argument that is returned; shape, strides, dtype and device of a new tensor; or unknown.
        self._known: dict[tuple[Any, ...], Any] = {}

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operator returns."""
        tensors: list[FakeTensor] = []
        key: list[Any] = [func, torch.get_default_dtype()]
        if not (_is_plain(func) and _describe((*args, *kwargs, *kwargs.values()), key, tensors) and tensors):
            return func(*args, **kwargs)
        known = self._known.get(found := tuple(key))
        if known is None:
            answer = func(*args, **kwargs)
            self._known[found] = _kind_of(answer, args, tensors)
            return answer
        if known is _UNKNOWN:
            return func(*args, **kwargs)
        if isinstance(known, int):
            return args[known]
        mode = tensors[0].fake_mode
        shape, strides, dtype, device = known
        with in_kernel_invocation_manager(mode):
            empty = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        return _faked(empty, mode, device)


def _faked(meta: Tensor, mode: FakeTensorMode, device: torch.device) -> FakeTensor:
    """``FakeTensor(mode, meta, device)`` in a fifth of the time: its attributes are those of all new ones."""
    made = Tensor._make_subclass(FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=device)
    if mode._allow_unsafe_data_ptr_access:
        torch._C._set_warn_deprecated_on_mutable_data_ptr(made)
    else:
        torch._C._set_throw_on_mutable_data_ptr(made)
    vars(made).update(_attributes(mode, device))
    return made


@lru_cache(maxsize=4)
def _attributes(mode: FakeTensorMode, device: torch.device) -> dict[str, Any]:
    with in_kernel_invocation_manager(mode):
        return dict(vars(FakeTensor(mode, torch.empty(0, device="meta"), device)))


@cache
def _is_plain(func: Any) -> bool:
    """Whether what an operator returns follows from its arguments, and it changes no shape of theirs."""
    return bool(func.namespace == "aten" and torch.Tag.inplace_view not in func.tags)


def _describe(values: Iterable[Any], key: list[Any], tensors: list[FakeTensor]) -> bool:
    """Appends to a key what an answer may depend on; False if that is more than can be told."""
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if value.constant is not None or value.layout is not torch.strided or value.dtype.is_complex:
                return False
            # The strides of what is returned follow from these.
            key += value.dtype, value.shape, value.stride(), value.fake_device, value.requires_grad
            tensors.append(value)
        elif kind in (list, tuple):
            key += kind, len(value)
            if not _describe(value, key, tensors):
                return False
        elif kind in _PLAIN:
            key += kind, value
        else:
            return False
    return True


def _kind_of(answer: Any, args: tuple[Any, ...], tensors: list[FakeTensor]) -> Any:
    """The entry of an answer."""
    same = [number for number, value in enumerate(args) if value is answer]
    if same:
        return same[0]
    if type(answer) is not FakeTensor or answer.constant is not None or answer.requires_grad:
        return _UNKNOWN
    storage = answer.untyped_storage()
    if answer.layout is not torch.strided or any(storage._cdata == each.untyped_storage()._cdata for each in tensors):
        return _UNKNOWN
    known = tuple(answer.shape), answer.stride(), answer.dtype, answer.fake_device
    with in_kernel_invocation_manager(answer.fake_mode):
        empty = torch.empty_strided(*known[:2], dtype=answer.dtype, device="meta")
    return known if answer.storage_offset() == 0 and empty.untyped_storage().nbytes() == storage.nbytes() else _UNKNOWN
