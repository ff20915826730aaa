"""Storage that features attach to a batch or a run, and a table that recognizes tensors by their memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

T = TypeVar("T")


class Notes:
    """Objects that features attach to a batch or a run, one for each type.

    A feature defines a type with defaults for all fields, and asks for its object by the type. No other code has to
    know the type.

    Example:
        >>> batch.notes.of(MaskTable)[mask] = spec
    """

    def __init__(self) -> None:
        self._kept: dict[type, object] = {}

    def of(self, kind: Callable[[], T]) -> T:
        """The object of type ``kind``, created at the first call."""
        key = cast(type, kind)
        if key not in self._kept:
            self._kept[key] = kind()
        return cast(T, self._kept[key])


def version(tensor: Tensor) -> int:
    """Counts the writes to a tensor and its views; 0 in inference mode, where nothing counts them."""
    return 0 if tensor.is_inference() else int(tensor._version)


def is_plain(value: object) -> bool:
    """Whether a value is a tensor or a parameter that stands for nothing else, as other subclasses may.

    A fake tensor is one without memory.
    """
    return type(value) in (Tensor, nn.Parameter, FakeTensor)


class StorageTable(Generic[T]):
    """Facts about tensors, looked up by storage. All views of a tensor, also detached ones, share its fact.

    An entry is removed together with the last tensor on its storage. So a new tensor at the same address is not
    mistaken for the old one.

    Example:
        >>> table = StorageTable()
        >>> table[mask] = "causal"
        >>> table.get(mask[:, :2].detach())
        'causal'
    """

    def __init__(self) -> None:
        self._facts: WeakKeyDictionary[torch.UntypedStorage, T] = WeakKeyDictionary()

    def __setitem__(self, tensor: Tensor, fact: T) -> None:
        self._facts[tensor.untyped_storage()] = fact

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage() in self._facts

    def get(self, tensor: Tensor) -> T | None:
        """The fact about ``tensor``, or None if its storage is not in the table."""
        return self._facts.get(tensor.untyped_storage())


def known(tensors: Iterable[Tensor]) -> StorageTable[None]:
    """A table for ``in`` only: whether a tensor shares its storage with one of ``tensors``."""
    table: StorageTable[None] = StorageTable()
    for tensor in tensors:
        table[tensor] = None
    return table
