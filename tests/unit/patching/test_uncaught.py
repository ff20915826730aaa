"""What the interpreter prints of a refusal that nobody caught."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from lightning_ulysses import UlyssesError
from lightning_ulysses.patching import uncaught
from lightning_ulysses.patching.uncaught import print_briefly


def refuse(value: Any) -> None:
    raise UlyssesError("a string", "a number", "give a number")


def refused() -> UlyssesError:
    """Raised in the user's program, by way of a library."""
    try:
        torch.utils._pytree.tree_map(refuse, ["x"])
    except UlyssesError as error:
        return error
    raise AssertionError


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    before: list[Any] = []
    monkeypatch.setattr(sys, "excepthook", lambda *args: before.append(args[1]))
    monkeypatch.setattr(uncaught, "_LINGER", 0.0)

    def show(error: BaseException) -> tuple[str, list[Any]]:
        before.clear()
        sys.excepthook(type(error), error, error.__traceback__)
        return capsys.readouterr().err, list(before)

    return show


def test_only_the_lines_of_the_users_program(shown: Any) -> None:
    error = refused()
    print_briefly(error, is_silent=False)
    text, before = shown(error)
    assert not before and text.count("UlyssesError: Got a string. Expected a number.") == 1
    assert "in refused" in text and "in refuse\n" in text and "_pytree.py" not in text
    assert len(text.splitlines()) <= 8


def test_other_errors_and_other_ranks(shown: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that has nothing to add is silent. An error that was not announced is shown as ever."""
    error, other = refused(), refused()
    print_briefly(error, is_silent=True)
    assert shown(error) == ("", [])
    assert shown(other) == ("", [other]) and shown(ValueError("x"))[1]
    # One hook, however many runs of a process are refused.
    hook = sys.excepthook
    print_briefly(other, is_silent=False)
    assert sys.excepthook is hook and "Got a string" in shown(other)[0]
    monkeypatch.setenv(uncaught.FULL, "1")
    whole = refused()
    print_briefly(whole, is_silent=True)
    assert shown(whole) == ("", [whole])
