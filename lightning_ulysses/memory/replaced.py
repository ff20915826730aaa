"""A method of one module that is replaced, and that copies of the module do not inherit."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from lightning_ulysses.patching.handle import Handle


class Replaced:
    """Stands for a method of one module.

    A copy of the module, such as an average of weights, gets the method of its class back. So does a pickled one.

    Args:
        module: The module.
        name: Of the method.
        replacement: What to call instead.
    """

    def __init__(self, module: nn.Module, name: str, replacement: Callable[..., Any]) -> None:
        self._module = module
        self._name = name
        self._replacement = replacement
        # Somebody else may have replaced the method of this module before.
        self._is_own = name in vars(module)
        self.original: Callable[..., Any] = getattr(module, name)
        # Plans read the names of parameters.
        with contextlib.suppress(TypeError, ValueError):
            self.__signature__ = inspect.signature(self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the replacement."""
        return self._replacement(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._module))
        if self._is_own or copied is None:
            return copy.deepcopy(self.original, memo)
        return MethodType(getattr(type(copied), self._name), copied)

    def __reduce__(self) -> tuple[Any, ...]:
        # The module is known to the pickle before its attributes are; at that time it has the method of its class.
        return getattr, (self._module, self._name)

    def put(self, handle: Handle) -> None:
        """Replaces the method until ``handle`` is removed."""
        setattr(self._module, self._name, self)

        def undo() -> None:
            if vars(self._module).get(self._name) is not self:
                return
            delattr(self._module, self._name)
            if self._is_own:
                setattr(self._module, self._name, self.original)

        handle.add(undo)
