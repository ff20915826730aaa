"""Bars for waits appear late, on rank 0's terminal alone, and go away."""

from __future__ import annotations

import io
import time
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_only
from models import HandWritten, pair_batch

from lightning_ulysses import progress as bars
from lightning_ulysses.data.corpus import Corpus
from lightning_ulysses.data.token_cache import TokenCache
from lightning_ulysses.progress import progress, tracked
from lightning_ulysses.testing import SplitRun
from lightning_ulysses.testing.processes import ProcessPool
from lightning_ulysses.testing.runs import fit_rank


class Terminal(io.StringIO):
    """What a person would see."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    monkeypatch.setattr(bars, "DELAY", 0.05)
    monkeypatch.setattr(bars, "_EVERY", 0.02)


def _seen(file: io.StringIO, unit: str = "things") -> str:
    """What a wait for three things writes."""
    with redirect_stderr(file):
        if unit:
            for _ in tracked([1, 2, 3], "Counting", unit):
                time.sleep(0.12)
        else:
            with progress("Waiting"):
                time.sleep(0.2)
    return file.getvalue()


def test_a_bar_counts_and_is_gone_afterwards() -> None:
    seen = _seen(Terminal())
    assert "Counting" in seen and "2/3" in seen and "things" in seen
    assert not seen.split("\r")[-2].strip() and "\n" not in seen


def test_a_wait_that_counts_nothing_shows_its_time() -> None:
    assert "Waiting [00:0" in _seen(Terminal(), unit="")


def test_short_waits_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "DELAY", 30.0)
    assert not _seen(Terminal())


def test_other_ranks_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert not _seen(Terminal())


def test_what_is_no_terminal_gets_nothing() -> None:
    assert not _seen(io.StringIO())


def test_a_line_is_printed_above_a_bar_of_rich() -> None:
    from rich.console import Console
    from rich.live import Live

    terminal = Terminal()
    live = Live("a bar", console=Console(file=terminal, force_terminal=True))
    with redirect_stderr(terminal), live, progress("Waiting"):
        time.sleep(0.2)
    assert "a bar" in terminal.getvalue() and terminal.getvalue().count("Waiting ...") == 1


def test_an_error_ends_the_bar() -> None:
    terminal = Terminal()
    with redirect_stderr(terminal), pytest.raises(ValueError, match="wrong"), progress("Waiting"):
        raise ValueError("wrong")
    time.sleep(0.1)
    assert not terminal.getvalue()


def encode(text: str) -> list[int]:
    return list(text.encode())


def test_tokenizing_tells_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "DELAY", 0.0)
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    terminal = Terminal()
    with redirect_stderr(terminal):
        TokenCache(tmp_path / "cache", encode).build(Corpus(str(tmp_path / "texts.jsonl")))
    assert "Tokenizing" in terminal.getvalue() and "rows" in terminal.getvalue()


def fit_on_a_terminal(rank: int) -> str:
    terminal, before = Terminal(), bars.DELAY
    bars.DELAY = 0.0
    try:
        with redirect_stderr(terminal):
            fit_rank(rank, HandWritten, [pair_batch(1, 33, 2)], SplitRun(2, 2))
    finally:
        bars.DELAY = before
    return terminal.getvalue()


def test_the_trial_of_a_step_tells_its_runs(pool: ProcessPool) -> None:
    first, second = pool.run(fit_on_a_terminal, world_size=2)
    assert "Trying a step of 'train' on a few tokens" in first and "Trying" not in second
