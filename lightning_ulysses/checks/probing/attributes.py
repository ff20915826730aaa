"""Restores the attributes of modules that a forward changes: losses collected in a list, counters, cached sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# Attributes of every nn.Module, such as its hooks and submodules.
_INTERNAL = frozenset(vars(nn.Module()))


def _content(value: Any) -> Any:
    """A shallow copy of a list, dict or set; None for anything else."""
    return value.copy() if isinstance(value, (list, dict, set)) else None


def _refill(value: Any, content: Any) -> None:
    # In place, since other objects may hold the same list or dict.
    if isinstance(value, list):
        value[:] = content
    else:
        value.clear()
        value.update(content)


@contextmanager
def attributes_kept(root: nn.Module) -> Iterator[None]:
    """Restores the attributes of ``root`` and its submodules, and the contents of their lists, dicts and sets."""
    before = [
        (module, {name: (value, _content(value)) for name, value in vars(module).items() if name not in _INTERNAL})
        for module in root.modules()
    ]
    try:
        yield
    finally:
        for module, saved in before:
            # Not setattr: it would register parameters and submodules again.
            now = vars(module)
            for name in [name for name in now if name not in saved and name not in _INTERNAL]:
                del now[name]
            for name, (value, content) in saved.items():
                now[name] = value
                if content is not None:
                    _refill(value, content)
