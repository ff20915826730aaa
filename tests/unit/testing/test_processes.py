"""The pool of worker processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lightning_ulysses.testing import processes
from lightning_ulysses.testing.processes import ProcessPool, RemoteError


def answer(rank: int, value: int, seconds: float = 0.0) -> int:
    time.sleep(seconds)
    if value < 0:
        raise ValueError("negative")
    return value


def start_and_die(folder: str) -> None:
    pool = ProcessPool(1)
    pool.run(answer, 1, world_size=1)
    (Path(folder) / "pid").write_text(str(pool._processes[0].pid))
    pool._connections[0].send((answer, (1, 600.0), {"RANK": "0"}))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.processes
def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    """Also while they work, or wait for each other."""
    parent = multiprocessing.get_context("spawn").Process(target=start_and_die, args=(str(tmp_path),))
    parent.start()
    parent.join()
    worker = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not _is_running(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")


def _is_running(pid: int) -> bool:
    """A process that nobody has waited for yet counts as ended."""
    status = Path(f"/proc/{pid}/stat")
    return status.is_file() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def only_in(module: ModuleType) -> Any:
    """A function of a module that other processes cannot import."""

    def answer(rank: int) -> int:
        return rank

    answer.__module__, answer.__qualname__ = module.__name__, "answer"
    return answer


def leave(rank: int) -> None:
    os._exit(1)


@pytest.mark.processes
def test_no_answer_is_taken_for_that_of_another_run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run that fails keeps the processes; one that is cut short or loses one of them does not."""
    with ProcessPool(1, timeout=120) as pool:
        with pytest.raises(RemoteError, match="negative"):
            pool.run(answer, -1, world_size=1)
        first = pool._processes[0].pid
        only_here = ModuleType("only_here")
        only_here.answer = only_in(only_here)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "only_here", only_here)
        with pytest.raises(RemoteError, match="No module named 'only_here'"):
            pool.run(only_here.answer, world_size=1)
        assert pool.run(answer, 1, world_size=1) == [1] and pool._processes[0].pid == first

        pool.timeout = 0.2
        with pytest.raises(TimeoutError, match=r"ranks \[0\] did not answer"):
            pool.run(answer, 2, 1.0, world_size=1)
        # It shows where it was.
        assert "in answer" in capfd.readouterr().err
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


def seen(rank: int) -> tuple[int, str | None]:
    print("seen", file=sys.stderr, flush=True)
    return hash("a string"), os.environ.get("ONLY_NOW")


@pytest.mark.processes
def test_a_copy_has_the_environment_and_the_outputs_of_the_process_that_asks(
    pool: ProcessPool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # By now the process that is copied runs.
    pool.run(seen, world_size=2)
    monkeypatch.setenv("ONLY_NOW", "set")
    capfd.readouterr()
    with ProcessPool(1, timeout=120) as fresh:
        assert fresh.run(seen, world_size=1)[0][1] == "set"
    assert "seen" in capfd.readouterr().err


@pytest.mark.skipif("PYTHONHASHSEED" in os.environ, reason="all hashes are alike")
def test_orders_of_sets_differ_between_ranks(pool: ProcessPool) -> None:
    """Otherwise no test would see a collective that depends on one."""
    hashes = [found for found, _ in pool.run(seen, world_size=2)]
    assert hashes[0] != hashes[1]


def connect(rank: int) -> bool:
    """Whether the address at which ranks meet is open; rank 0 does nothing for it."""
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(place, timeout=10):
        return True
    return False


def test_ranks_wait_for_no_other_to_open_the_place_where_they_meet(pool: ProcessPool) -> None:
    assert pool.run(connect, world_size=2) == [True, True]


@pytest.mark.processes
def test_importing_is_no_part_of_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "takes_long.py").write_text("import time\ntime.sleep(2.5)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with ProcessPool(1, timeout=2, preload=["takes_long"]) as pool:
        # Nothing that is imported for it.
        assert pool.run(abs, world_size=1) == [0]
        pool.close()
        pool.preload = ("no_such_module",)
        with pytest.raises(RemoteError, match="the process died while it started"):
            pool.run(abs, world_size=1)
