"""A pool of processes that run functions one after another, as ranks of a gloo world."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import multiprocessing
import os
import pickle
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import Any, TypeVar

from lightning_ulysses.upstream import deepspeed as upstream_deepspeed

T = TypeVar("T")


class RemoteError(RuntimeError):
    """The error of a rank, with its traceback. ``cause`` is the exception, if it could be sent."""

    def __init__(self, rank: int, text: str, cause: BaseException | None) -> None:
        super().__init__(f"rank {rank}:\n{text}")
        self.rank = rank
        self.cause = cause


# Whether a process that hangs can be told to show where.
_SHOWS_STACKS = hasattr(signal, "SIGUSR1")
# Runs between two garbage collections. Trainers are reference cycles, and hold threads of their process groups.
_COLLECT_EVERY = 6


# Systems hand out higher ones to whoever asks for any, such as gloo: one that is free now may be taken a moment later.
_PORTS = range(20_000, 32_000)


def free_port() -> int:
    """A free TCP port."""
    while True:
        port = secrets.choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _store() -> Any:
    """Where the ranks of one run meet; it ends with the object."""
    import torch.distributed as dist

    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _clean_up(runs: int) -> None:
    import torch.distributed as dist

    # Before the process group is destroyed, since ZeRO-3 asks for the rank.
    if "deepspeed" in sys.modules:
        upstream_deepspeed.release_engines()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    if "deepspeed" in sys.modules:
        upstream_deepspeed.forget_world()
    if runs == 1 or runs % _COLLECT_EVERY == 0:
        _collect_garbage()


def _collect_garbage() -> None:
    gc.collect()
    # What is left are imported modules and their tables, so the collector need not look at them again.
    gc.freeze()


def _end_with_parent() -> None:
    """Ends this process once its parent is gone, even if it waits for other ranks in a collective."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _start_method() -> str:
    """How processes begin: one imports everything and the others are copies of it, unless a device cannot be copied."""
    import torch

    has_copies = "forkserver" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
    return "forkserver" if has_copies and not torch.accelerator.is_available() else "spawn"


def _inherit(environment: dict[str, str], outputs: Sequence[Connection]) -> None:
    """What a copy has not from the process that asked for it, but from the one that was copied."""
    os.environ.clear()
    os.environ.update(environment)
    for number, output in enumerate(outputs, start=1):
        os.dup2(output.fileno(), number)


def _outputs() -> list[Connection]:
    """Standard output and error of this process, in a form that can be sent."""
    return [Connection(os.dup(number), readable=False) for number in (1, 2)]


def _serve(
    connection: Connection, preload: Sequence[str], environment: dict[str, str], outputs: Sequence[Connection]
) -> None:
    """Says that it is ready, then runs the functions that it is sent, until the other end closes the connection."""
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    _inherit(environment, outputs)
    torch.set_num_threads(1)
    for name in preload:
        importlib.import_module(name)
    # Imported modules and their tables stay, so the collector need not look at them.
    gc.freeze()
    connection.send(os.getpid())
    runs = 0
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        # By now nothing of the run is held here.
        answer = _answer(message)
        runs += 1
        _clean_up(runs)
        try:
            connection.send_bytes(answer)
        except BrokenPipeError:
            return


def _answer(message: bytes) -> bytes:
    """What a function returns, or the error that it raises."""
    try:
        # Unpickling imports the modules of the function and its arguments. That may fail here although it worked in
        # the parent.
        function, args, environment = pickle.loads(message)
        os.environ.update(environment)
        if _SHOWS_STACKS:
            # For each run: Lightning's Trainer resets handlers when it ends.
            faulthandler.unregister(signal.SIGUSR1)
            faulthandler.register(signal.SIGUSR1)
        return bytes(ForkingPickler.dumps((True, function(int(environment["RANK"]), *args))))
    except BaseException as error:
        cause: BaseException | None = error
        try:
            # Some exceptions can be pickled but not unpickled.
            pickle.loads(pickle.dumps(error))
        except Exception:
            cause = None
        return bytes(ForkingPickler.dumps((False, (traceback.format_exc(), cause))))


class ProcessPool:
    """Processes that are reused from one world to the next.

    Args:
        size: Number of processes; a run may use fewer.
        timeout: Seconds after which a run counts as hung.
        preload: Modules that processes import before the time of their first run begins.
        copies: Processes are copies of one that has imported everything, where the system and its devices allow it.
        own_hashes: Rank 0 is no copy, so that its hashes of strings, and with them the order of sets, are others than
            those of other ranks, as in a training.
    """

    def __init__(
        self,
        size: int,
        timeout: float = 300.0,
        preload: Sequence[str] = (),
        copies: bool = True,
        own_hashes: bool = False,
    ) -> None:
        self.size = size
        self.timeout = timeout
        self.preload = tuple(preload)
        self.copies, self.own_hashes = copies, own_hashes
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _start(self) -> None:
        # Runs before multiprocessing's own exit handler, which would wait forever for the processes.
        atexit.register(self.close)
        # torch reads this variable when it is loaded, so it must be set before the process starts.
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            for rank in range(self.size):
                is_copy = self.copies and not (self.own_hashes and rank == 0)
                with self._starting(rank):
                    self._start_one(_start_method() if is_copy else "spawn")
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        for rank, connection in enumerate(self._connections):
            with self._starting(rank):
                connection.recv()

    @contextlib.contextmanager
    def _starting(self, rank: int) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError) as error:
            self.close()
            raise RemoteError(rank, "the process died while it started", None) from error

    def _start_one(self, method: str) -> None:
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            # Of no effect on one that runs already; what it lacks is then imported by each copy.
            context.set_forkserver_preload([__name__, *upstream_deepspeed.LATE_IMPORTS, *self.preload])
        here, there = context.Pipe()
        outputs = _outputs() if method == "forkserver" else []
        # Not daemonic, since daemonic processes may not start dataloader workers.
        process = context.Process(target=_serve, args=(there, self.preload, dict(os.environ), outputs))
        process.start()
        for connection in (there, *outputs):
            connection.close()
        self._processes.append(process)
        self._connections.append(here)

    def run(self, function: Callable[..., T], *args: Any, world_size: int) -> list[T]:
        """Calls ``function(rank, *args)`` on ``world_size`` processes.

        Returns:
            The result of each rank.

        Raises:
            RemoteError: The error of the first rank that failed. Ranks that wait for it are ended.
            TimeoutError: If a rank does not answer in time.
        """
        if world_size > self.size:
            raise ValueError(f"A world of {world_size} processes in a pool of {self.size}.")
        store = _store()
        environment = {
            "MASTER_ADDR": store.host,
            "MASTER_PORT": str(store.port),
            # Ranks meet in the store of this process: one kept by rank 0 is not there yet when others look for it.
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(world_size),
            "NODE_RANK": "0",
        }
        try:
            if not self._processes:
                self._start()
            for rank in range(world_size):
                own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                self._connections[rank].send((function, args, own))
            return self._collect(world_size)
        except RemoteError:
            raise
        except BaseException:
            # A rank that has not answered yet would answer in the next run.
            self.close()
            raise

    def _collect(self, world_size: int) -> list[Any]:
        waiting: dict[Any, int] = {self._connections[rank]: rank for rank in range(world_size)}
        results: list[Any] = [None] * world_size
        failure: RemoteError | None = None
        broken = False
        deadline = time.monotonic() + self.timeout
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in sorted(ready, key=waiting.__getitem__):
                rank = waiting.pop(connection)
                try:
                    good, payload = self._connections[rank].recv()
                except (EOFError, ConnectionError):
                    good, payload, broken = False, ("the process died", None), True
                if good:
                    results[rank] = payload
                elif failure is None:
                    failure = RemoteError(rank, *payload)
                    # Other ranks may wait for it in a collective, so they get a few seconds only.
                    deadline = min(deadline, time.monotonic() + 5.0)
        if waiting:
            if failure is None:
                self._show_stacks(waiting.values())
                raise TimeoutError(f"ranks {sorted(waiting.values())} did not answer within {self.timeout:.0f} s")
            broken = True
        if broken:
            self.close()
        if failure is not None:
            raise failure
        return results

    def _show_stacks(self, ranks: Iterable[int]) -> None:
        """Has processes print where each of their threads is."""
        for rank in ranks:
            if _SHOWS_STACKS and self._processes[rank].is_alive():
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
                # One after another, since they share an output.
                time.sleep(0.2)

    def close(self) -> None:
        """Ends all processes; the next run starts new ones."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(timeout=5.0)
            if process.is_alive():
                # Lightning's signal handler starts a broadcast, which waits for ranks that may be gone.
                process.kill()
                process.join()
        self._processes, self._connections = [], []
        atexit.unregister(self.close)
