"""The object that every interceptor's ``install`` returns, to undo it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Handle:
    """Undoes patches, the last one first. Removing twice does nothing."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def add(self, undo: Callable[[], None]) -> None:
        """Registers a function that undoes one thing."""
        self._undo.append(undo)

    def patch(self, owner: Any, name: str, replacement: Any) -> None:
        """Sets ``owner.name`` until `remove`. If somebody has patched it again since, that patch stays."""
        original = getattr(owner, name)
        is_inherited = isinstance(owner, type) and name not in vars(owner)
        setattr(owner, name, replacement)

        def undo() -> None:
            if getattr(owner, name) is not replacement:
                return
            if is_inherited:
                delattr(owner, name)
            else:
                setattr(owner, name, original)

        self.add(undo)

    def patch_item(self, mapping: dict[str, Any], key: str, replacement: Any) -> None:
        """Sets ``mapping[key]`` until `remove`."""
        original = mapping[key]
        mapping[key] = replacement

        def undo() -> None:
            if mapping.get(key) is replacement:
                mapping[key] = original

        self.add(undo)

    def remove(self) -> None:
        """Restores everything."""
        while self._undo:
            self._undo.pop()()
