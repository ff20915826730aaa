"""Memory that a piece of code takes, counted by the tensors that torch hands out. The same on every device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryCount(TorchDispatchMode):
    """Counts the bytes of every storage that is made while the mode is on, until it is freed.

    Attributes:
        now: Bytes that are held.
        peak: The most at any time since `restart`.
        operations: Dispatched operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.operations = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def hold(self, *tensors: Tensor) -> None:
        """Counts tensors that exist already."""
        for tensor in tensors:
            self._add(tensor)

    def restart(self) -> None:
        """Begins a new peak."""
        self.peak = self.now

    def _free(self, size: int) -> None:
        self.now -= size

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage.nbytes())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result
