"""What features remember of a batch or a run, and of tensors, which are recognised by their memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

T = TypeVar("T")


class Notes:
    """What features remember, each in one object of a type of its own.

    A feature defines the type, with defaults for all fields, and asks for its object; nobody else has to know of it.

    Example:
        >>> batch.notes.of(MaskTable)[mask] = spec
    """

    def __init__(self) -> None:
        self._kept: dict[type, object] = {}

    def of(self, kind: Callable[[], T]) -> T:
        """The object of type ``kind``, made when it is first asked for."""
        key = cast(type, kind)
        if key not in self._kept:
            self._kept[key] = kind()
        return cast(T, self._kept[key])


class StorageTable(Generic[T]):
    """Facts about tensors, looked up by storage: views, slices, expanded and detached copies share the fact.

    An entry goes when the last tensor on its storage does, so a new tensor at the same address is a stranger.

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
        """The fact, or None for a stranger."""
        return self._facts.get(tensor.untyped_storage())


def known(tensors: Iterable[Tensor]) -> StorageTable[None]:
    """A table that only answers whether a tensor is one of ``tensors``."""
    table: StorageTable[None] = StorageTable()
    for tensor in tensors:
        table[tensor] = None
    return table
