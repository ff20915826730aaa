"""The pool of worker processes."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from lightning_ulysses import processes
from lightning_ulysses.processes import ProcessPool, RemoteError


def answer(rank: int, value: int, seconds: float = 0.0) -> int:
    time.sleep(seconds)
    if value < 0:
        raise ValueError("negative")
    return value


def leave(rank: int) -> None:
    os._exit(1)


def test_no_answer_is_taken_for_that_of_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that fails keeps the processes; one that is cut short or loses one of them does not."""
    with ProcessPool(1, timeout=120) as pool:
        with pytest.raises(RemoteError, match="negative"):
            pool.run(answer, -1, world_size=1)
        first = pool._processes[0].pid
        assert pool.run(answer, 1, world_size=1) == [1] and pool._processes[0].pid == first

        pool.timeout = 0.2
        with pytest.raises(TimeoutError, match=r"ranks \[0\] did not answer"):
            pool.run(answer, 2, 1.0, world_size=1)
        pool.timeout = 120
        assert pool.run(answer, 3, world_size=1) == [3]

        with pytest.raises(RemoteError, match="the process died"):
            pool.run(leave, world_size=1)

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(processes, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                pool.run(answer, 4, world_size=1)
        assert pool.run(answer, 5, world_size=1) == [5]
