"""Finds attention functions that were bound before the strategy existed.

``from torch.nn.functional import scaled_dot_product_attention`` and ``self.attend = F.scaled_dot_product_attention``
hold the function itself. A patch of ``torch.nn.functional`` does not reach them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any

from torch import nn

from lightning_ulysses.patching.handle import Handle

Function = Callable[..., Any]

# Our own modules call the originals and must keep them. torch's modules are patched by name. The others are half of all
# that is imported, and hold no function that is replaced; a test pins it.
LEAVE_ALONE = frozenset(
    ("torch", "lightning_ulysses", "deepspeed", "lightning", "mpmath", "networkx", "numpy", "sympy", "torchmetrics")
)


# Types of objects that may hold the function inside.
_WRAPPERS = {staticmethod, functools.partial}


def _replaced(value: Any, functions: Mapping[int, Function]) -> Any:
    """``value`` with a replacement in place of the function that it holds; ``value`` itself if that has none.

    Args:
        value: A function, or an object that holds one.
        functions: Replacements by the id of the original.
    """
    if type(value) is staticmethod and id(value.__func__) in functions:
        return staticmethod(functions[id(value.__func__)])
    if type(value) is functools.partial and id(value.func) in functions:
        return functools.partial(functions[id(value.func)], *value.args, **value.keywords)
    return functions.get(id(value), value)


def imported() -> Iterator[tuple[str, Any]]:
    """Imported modules that may hold a function, by name."""
    # A copy: another thread may import meanwhile.
    for name, module in sys.modules.copy().items():
        if name.partition(".")[0] not in LEAVE_ALONE and isinstance(getattr(module, "__dict__", None), dict):
            yield name, module


def _owners(root: nn.Module) -> list[Any]:
    """Imported modules that may hold a function, every submodule of ``root``, and the classes of these."""
    owners: list[Any] = [module for _, module in imported()]
    submodules = list(root.modules())
    owners += submodules
    owners += {kind for module in submodules for kind in type(module).__mro__ if kind.__module__ != "builtins"}
    return owners


def compiled_copies(root: nn.Module, original: Function) -> list[Function]:
    """Functions that ``torch.compile`` made of ``original``, among those that `rebind` can reach."""
    # By id, since one function may be held in several places.
    copies: dict[int, Function] = {}
    for owner in _owners(root):
        functions = [value for value in list(vars(owner).values()) if type(value) is FunctionType]
        copies |= {id(f): f for f in functions if getattr(f, "_torchdynamo_orig_callable", None) is original}
    return list(copies.values())


def rebind(handle: Handle, root: nn.Module, functions: Mapping[Function, Function]) -> None:
    """Puts replacements wherever their originals are held, and registers the undo with ``handle``.

    One call for many functions takes as long as one for a single function.

    Searches the globals of every imported module outside of `LEAVE_ALONE`. Also searches the attributes of every
    submodule of ``root`` and of its classes. A ``functools.partial`` or ``staticmethod`` of the function counts too.
    Closures and default arguments are out of reach.

    Args:
        handle: Takes the undo.
        root: The user's LightningModule.
        functions: The replacement of each original.
    """
    # By id: a value of a module need not be hashable.
    by_id = {id(original): replacement for original, replacement in functions.items()}
    for owner in _owners(root):
        values = list(vars(owner).values())
        # There are about a hundred thousand values. This check compares them in C instead of in a Python loop.
        if by_id.keys().isdisjoint(map(id, values)) and _WRAPPERS.isdisjoint(map(type, values)):
            continue
        # type() and not isinstance(), which reads __class__: that may make a lazy object load itself.
        found = [(n, v) for n, v in list(vars(owner).items()) if id(v) in by_id or type(v) in _WRAPPERS]
        for name, value in found:
            new = _replaced(value, by_id)
            if new is not value:
                _put(handle, owner, name, value, new)


def _put(handle: Handle, owner: Any, name: str, old: Any, new: Any) -> None:
    setattr(owner, name, new)

    def undo() -> None:
        # Somebody else may have set the attribute since.
        if vars(owner).get(name) is new:
            setattr(owner, name, old)

    handle.add(undo)
