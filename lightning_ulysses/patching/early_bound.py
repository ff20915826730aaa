"""Finds attention functions that were bound before the strategy existed.

``from torch.nn.functional import scaled_dot_product_attention`` and ``self.attend = F.scaled_dot_product_attention``
keep the function itself, which a patch of ``torch.nn.functional`` does not reach.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import nn

from lightning_ulysses.patching.handle import Handle

_LEAVE_ALONE = ("torch", "lightning_ulysses")


# What may hold a function without being it.
_WRAPPERS = {staticmethod, functools.partial}


def _replaced(value: Any, original: Callable[..., Any], replacement: Callable[..., Any]) -> Any:
    """What stands for ``value``; ``value`` itself where it is another function."""
    if value is original:
        return replacement
    if isinstance(value, staticmethod) and value.__func__ is original:
        return staticmethod(replacement)
    if isinstance(value, functools.partial) and value.func is original:
        return functools.partial(replacement, *value.args, **value.keywords)
    return value


def _owners(root: nn.Module) -> list[Any]:
    """Every imported module but torch's and ours, every submodule of ``root`` and their classes."""
    owners: list[Any] = [
        module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] not in _LEAVE_ALONE and isinstance(getattr(module, "__dict__", None), dict)
    ]
    submodules = list(root.modules())
    owners += submodules
    owners += {kind for module in submodules for kind in type(module).__mro__ if kind.__module__ != "builtins"}
    return owners


def compiled_copies(root: nn.Module, original: Callable[..., Any]) -> list[Callable[..., Any]]:
    """What ``torch.compile`` has made of ``original`` and `rebind` would come across."""
    values = (value for owner in _owners(root) for value in list(vars(owner).values()))
    functions = [value for value in values if type(value) is FunctionType]
    copies = {id(f): f for f in functions if getattr(f, "_torchdynamo_orig_callable", None) is original}
    return list(copies.values())


def rebind(handle: Handle, root: nn.Module, original: Callable[..., Any], replacement: Callable[..., Any]) -> None:
    """Puts ``replacement`` wherever ``original`` is held, and has ``handle`` undo it.

    Looks at the globals of every imported module but torch's, and at the attributes of every submodule of ``root`` and
    of its class, partial applications among them. Closures and default arguments are out of reach.
    """
    for owner in _owners(root):
        values = list(vars(owner).values())
        # There are a hundred thousand values, and this asks about all of them without a loop in Python.
        if id(original) not in map(id, values) and _WRAPPERS.isdisjoint(map(type, values)):
            continue
        # Asking other values for their class may have lazy ones do what they put off.
        found = [(n, v) for n, v in list(vars(owner).items()) if v is original or type(v) in _WRAPPERS]
        for name, value in found:
            new = _replaced(value, original, replacement)
            if new is not value:
                _put(handle, owner, name, value, new)


def _put(handle: Handle, owner: Any, name: str, old: Any, new: Any) -> None:
    setattr(owner, name, new)

    def undo() -> None:
        if vars(owner).get(name) is new:
            setattr(owner, name, old)

    handle.add(undo)
