"""Bars for waits of more than two seconds, on the terminal of rank 0 alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Event, Lock, Thread, Timer
from typing import TypeVar

from lightning.fabric.utilities.rank_zero import rank_zero_only
from rich.file_proxy import FileProxy
from tqdm import tqdm

#: Seconds after which a bar appears.
DELAY = 2.0
_EVERY = 1.0
Item = TypeVar("Item")


def unseen(count: int) -> None:
    """Shows nothing."""


@contextmanager
def progress(text: str, total: int | None = None, unit: str = "") -> Iterator[Callable[[int], object]]:
    """Shows that something goes on while the block runs, and how far it is.

    Nothing is shown on other ranks, where stderr is no terminal, and in the first `DELAY` seconds. The bar is gone
    afterwards. Below a bar of Rich's, such as the Trainer's, ``text`` is printed once instead.

    Args:
        text: What goes on.
        total: How many things there are, if that is known.
        unit: What is counted; only the time is shown if it is empty.

    Yields:
        A function to be told how many more are done.
    """
    if getattr(rank_zero_only, "rank", 0) != 0:
        yield unseen
        return
    if isinstance(sys.stderr, FileProxy):
        # Each refresh would be a line of its own.
        with _said(text):
            yield unseen
        return
    form = None if unit else "{desc} [{elapsed}]"
    lock, ended = Lock(), Event()
    with tqdm(
        total=total,
        desc=text,
        unit=f" {unit}",
        bar_format=form,
        delay=DELAY,
        # Time alone decides when to draw, so that a call that counts nothing draws as well.
        miniters=0,
        leave=False,
        dynamic_ncols=True,
        disable=None,
    ) as bar:

        def advance(count: int = 1) -> None:
            with lock:
                bar.update(count)

        def draw() -> None:
            while not ended.wait(_EVERY):
                advance(0)

        thread = Thread(target=draw, daemon=True)
        if not bar.disable:
            thread.start()
        try:
            yield advance
        finally:
            ended.set()
            if thread.is_alive():
                thread.join()


@contextmanager
def _said(text: str) -> Iterator[None]:
    timer = Timer(DELAY, print, [f"{text} ..."], {"file": sys.stderr})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def tracked(items: list[Item], text: str, unit: str) -> Iterable[Item]:
    """Goes through a list under a bar."""
    with progress(text, len(items), unit) as advance:
        for item in items:
            yield item
            advance(1)
