"""What a rank does whose run has failed: others may have failed as well, or wait for it in a collective."""

from __future__ import annotations

import atexit
import subprocess
import warnings
from typing import TYPE_CHECKING, Any

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.patching.uncaught import print_briefly
from lightning_ulysses.upstream.meeting import all_arrive, rank_zero_says_it

if TYPE_CHECKING:
    import lightning.pytorch as pl

# Seconds for other ranks to come, and for processes to end by themselves.
_PATIENCE = 10.0
# Seconds for rank 0 to refuse as well.
_ASKING = 3.0


class FailedRun:
    """Keeps a failed rank from waiting for others without an end.

    Args:
        trainer: The Trainer.
        name: Of the run; the same on all ranks, and another one for each run.
    """

    def __init__(self, trainer: pl.Trainer, name: str) -> None:
        self._trainer = trainer
        self._name = name
        self._has_company: bool | None = None

    @property
    def is_alone(self) -> bool:
        """Whether this rank has failed and others have not, so that they come to no collective of callbacks.

        Asked for the first time after an error, it waits for the others.
        """
        if not self._trainer.interrupted or self._trainer.world_size == 1:
            return False
        if self._has_company is None:
            self._has_company = all_arrive(f"{self._name}/failed", _PATIENCE)
        return not self._has_company

    def warn_unsaved(self, path: Any) -> None:
        """Says that a checkpoint is not there."""
        warnings.warn(
            f"No checkpoint was saved at {path} after the error on rank {self._trainer.global_rank}: it needs all "
            f"ranks, and some did not come within {_PATIENCE:.0f} seconds.",
            stacklevel=2,
        )

    def leave(self, error: BaseException) -> None:
        """Has the error shown once, if it is a refusal, and processes that this one has started end with it."""
        if isinstance(error, UlyssesError):
            is_alone = self._trainer.world_size == 1
            print_briefly(error, is_silent=not is_alone and rank_zero_says_it(self._name, str(error), _ASKING))
        launcher: Any = self._trainer.strategy.launcher
        if processes := getattr(launcher, "procs", None):
            # After the interpreter has shown the error. Lightning only looks after the processes while this one lives.
            atexit.register(_end, processes)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        try:
            process.wait(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            for each in processes:
                each.kill()
            return
