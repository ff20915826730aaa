"""Finds the compiled parts of a module. Calls can be observed at their boundary, but not inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule

from lightning_ulysses.patching.handle import Handle

# The methods that Lightning compiles if the whole module is compiled.
_STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether ``module.compile()`` has been called."""
    return module._compiled_call_impl is not None


def outermost_compiled(root: nn.Module) -> Iterator[nn.Module]:
    """``root`` and all its submodules except those inside compiled ones, in which a hook would break the graph.

    ``root`` itself counts as not compiled, see `uncompile_steps`.
    """
    seen: set[nn.Module] = set()

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        if module in seen:
            return
        seen.add(module)
        yield module
        # Does not descend into a compiled module.
        if module is root or not (isinstance(module, OptimizedModule) or is_compiled_in_place(module)):
            for child in module.children():
                yield from walk(child)

    return walk(root)


def uncompile_steps(root: nn.Module) -> Handle:
    """Makes ``root`` itself run uncompiled: its call, and the methods that Lightning compiles one by one.

    Returns:
        A handle that restores the compiled ones.
    """
    handle = Handle()
    if is_compiled_in_place(root):
        handle.patch(root, "_compiled_call_impl", None)
    for name in _STEPS:
        # Lightning stores a compiled method as an attribute of the instance. Dynamo keeps the original in it.
        original = getattr(vars(root).get(name), "_torchdynamo_orig_callable", None)
        if original is not None:
            handle.patch(root, name, original)
    return handle


def call_around(
    module: nn.Module, enter: Callable[[nn.Module, Any, Any], None], leave: Callable[[nn.Module, Any, Any], None]
) -> Handle:
    """Calls ``enter`` and ``leave`` around each call of a module compiled in place, outside of its graph."""
    # Hooks of such a module are part of its graph, so its compiled call is wrapped instead.
    compiled: Any = module._compiled_call_impl

    def around(*args: Any, **kwargs: Any) -> Any:
        output = None
        enter(module, args, kwargs)
        try:
            output = compiled(*args, **kwargs)
            return output
        finally:
            leave(module, args, output)

    handle = Handle()
    handle.patch(module, "_compiled_call_impl", around)
    return handle
