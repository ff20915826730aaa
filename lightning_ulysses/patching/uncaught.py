"""Has the interpreter print an uncaught refusal in a few lines, and once for all ranks."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any
from weakref import ref

from lightning_ulysses.errors import UlyssesError

#: Set in the environment, it keeps tracebacks whole on all ranks.
FULL = "ULYSSES_FULL_TRACEBACK"

# Seconds that a silent rank lives on. Launchers end all ranks with the first, and rank 0 has to print before that.
_LINGER = 1.0

# Frames of these say nothing about the user's program.
_INSIDE = frozenset({"lightning", "lightning_ulysses", "deepspeed", "torch", "transformers", "contextlib", "functools"})


def brief(error: UlyssesError) -> str:
    """The lines of the user's own program that led to a refusal, and its message."""
    walked = [*traceback.walk_tb(error.__traceback__)]
    own = [pair for pair in walked if str(pair[0].f_globals.get("__name__")).split(".")[0] not in _INSIDE]
    lines = traceback.StackSummary.extract(iter(own)).format()
    notes = "".join(f"{note}\n" for note in getattr(error, "__notes__", ()))
    kind = f"{type(error).__module__}.{type(error).__qualname__}"
    return f"Traceback (your program only; {FULL}=1 shows all):\n{''.join(lines)}{kind}: {error}\n{notes}"


class _Hook:
    """Takes the place of ``sys.excepthook``, which only sees what nobody caught."""

    def __init__(self, before: Callable[..., Any]) -> None:
        self.before = before
        self.error: Callable[[], UlyssesError | None] = lambda: None
        self.is_silent = False

    def __call__(self, kind: type[BaseException], value: BaseException, tb: TracebackType | None) -> None:
        if not isinstance(value, UlyssesError) or value is not self.error():
            self.before(kind, value, tb)
        elif self.is_silent:
            time.sleep(_LINGER)
        else:
            print(brief(value), end="", file=sys.stderr, flush=True)


def print_briefly(error: UlyssesError, *, is_silent: bool) -> None:
    """Has ``error`` printed briefly, or not at all, should nobody catch it. Other errors are printed as before.

    Args:
        error: A refusal that is on its way out of a run.
        is_silent: Whether another rank prints the same.
    """
    if os.environ.get(FULL, "0") not in ("", "0"):
        return
    hook = sys.excepthook
    if not isinstance(hook, _Hook):
        hook = sys.excepthook = _Hook(hook)
    # Weak, so that nothing outlives the run that somebody caught.
    hook.error, hook.is_silent = ref(error), is_silent
