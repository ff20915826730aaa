"""What every interceptor's ``install`` returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Handle:
    """Undoes what an interceptor installed, last thing first; removing twice does nothing."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def add(self, undo: Callable[[], None]) -> None:
        """Registers one thing to undo."""
        self._undo.append(undo)

    def patch(self, owner: Any, name: str, replacement: Any) -> None:
        """Sets ``owner.name`` until `remove`; a patch that somebody put on top of it meanwhile is left alone."""
        original = getattr(owner, name)
        setattr(owner, name, replacement)

        def undo() -> None:
            if getattr(owner, name) is replacement:
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
