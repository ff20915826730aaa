"""The exceptions that this package raises on purpose."""

from __future__ import annotations


class UlyssesError(RuntimeError):
    """A run that cannot be made exact, or an input that cannot be understood.

    Args:
        got: What was found, with the shapes, sizes or names seen.
        expected: What would have been fine.
        fix: The one thing to change.
    """

    def __init__(self, got: str, expected: str, fix: str) -> None:
        super().__init__(f"Got {got}. Expected {expected}. To fix: {fix}.")
        self.got = got
        self.expected = expected
        self.fix = fix

    def __reduce__(self) -> tuple[type[UlyssesError], tuple[str, str, str]]:
        return type(self), (self.got, self.expected, self.fix)


class UlyssesValueError(UlyssesError, ValueError):
    """An argument that no run could use; raised where it is given."""
