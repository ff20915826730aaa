"""The exceptions that this package raises."""

from __future__ import annotations


class UlyssesError(RuntimeError):
    """Raised for a run that cannot be made exact, or for an input whose meaning is not certain.

    Args:
        got: What was found, with shapes, sizes or names.
        expected: What would have been accepted.
        fix: The one thing to change.
    """

    def __init__(self, got: str, expected: str, fix: str) -> None:
        super().__init__(f"Got {got}. Expected {expected}. To fix: {fix}.")
        self.got = got
        self.expected = expected
        self.fix = fix

    # An exception is pickled with its message as only argument. This one takes three, and ranks send it to each other.
    def __reduce__(self) -> tuple[type[UlyssesError], tuple[str, str, str]]:
        return type(self), (self.got, self.expected, self.fix)


class UlyssesValueError(UlyssesError, ValueError):
    """Raised at once for an argument that is invalid in any run."""
