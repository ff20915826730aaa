"""Has all ranks of a training act together on a signal, between two batches.

Lightning calls collectives inside its signal handlers: a broadcast at SIGTERM, and all of a checkpoint's at the signal
by which SLURM requeues a job (``trainer/connectors/signal_connector.py``). A split run is nearly always inside another
collective then, and hangs. So handlers only take note here. Once per batch the ranks exchange what they noted, in place
of Lightning's broadcast from rank 0 (``loops/training_epoch_loop.py``, ``_broadcast_sigterm_tensor``).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_ulysses.patching.handle import Handle

if TYPE_CHECKING:
    import lightning.pytorch as pl


class SignalWatch:
    """Takes note of signals. Nothing else happens in a handler, apart from passing SIGTERM on to started processes.

    Args:
        trainer: The Trainer, whose handlers are not registered yet.
        device: The device of the collectives.
        host_group: Returns a group of all ranks for tensors on the host, or None.

    Attributes:
        in_step: Whether all ranks have equally many batches in the evaluation that runs.
    """

    def __init__(
        self, trainer: pl.Trainer, device: torch.device, host_group: Callable[[], dist.ProcessGroup | None]
    ) -> None:
        self._trainer = trainer
        self._host_group = host_group
        self._device = device
        self._connector: Any = trainer._signal_connector
        self._requeue: Callable[..., None] = self._connector._slurm_sigusr_handler_fn
        self._wants_end = self._wants_requeue = False
        self._signum = int(signal.SIGTERM)
        self._process = os.getpid()
        self.in_step = False

    def start(self) -> Handle:
        """Takes the place of Lightning's handlers until the handle is removed."""
        handle = Handle()
        replaced: tuple[tuple[Any, str, Callable[..., None]], ...] = (
            (self._connector, "_sigterm_notifier_fn", self._note_end),
            (self._connector, "_slurm_sigusr_handler_fn", self._note_requeue),
            (self._trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor", self.agree),
        )
        for owner, name, function in replaced:
            vars(owner)[name] = function
            handle.add(partial(_forget, owner, name))
        return handle

    def _note_end(self, signum: int, frame: Any = None) -> None:
        if os.getpid() != self._process:
            # A forked worker of a dataloader, which has inherited the handler and must end.
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        launcher: Any = self._trainer.strategy.launcher
        if launcher is not None and not self._wants_end:
            launcher.kill(signum)
        self._wants_end = True

    def _note_requeue(self, signum: int, frame: Any = None) -> None:
        self._signum, self._wants_requeue = signum, True

    def agree(self) -> None:
        """Acts on what any rank noted; a collective, before each training batch.

        Raises:
            SIGTERMException: On every rank, which is how Lightning ends a run.
        """
        wants_end, wants_requeue = self._exchange()
        if wants_requeue:
            self._wants_requeue = False
            self._requeue(self._signum, None)
        if wants_end:
            self._end()

    def agree_in_evaluation(self) -> None:
        """`agree` before an evaluation batch, where all ranks have equally many of them.

        Where they have not, an evaluation during a training goes on, and another one ends on each rank by itself. A job
        is requeued after the evaluation, since the checkpoint belongs between two training batches.
        """
        wants_end = self._exchange()[0] if self.in_step else self._wants_end and not self._is_fitting
        if wants_end:
            self._end()

    @property
    def _is_fitting(self) -> bool:
        return self._trainer.state.fn == TrainerFn.FITTING

    def _exchange(self) -> tuple[bool, bool]:
        group = self._host_group()
        # On the host, so that nothing waits for a device.
        device = self._device if group is None else torch.device("cpu")
        noted = torch.tensor([self._wants_end, self._wants_requeue], dtype=torch.int32, device=device)
        dist.all_reduce(noted, dist.ReduceOp.MAX, group=group)
        wants_end, wants_requeue = noted.tolist()
        return bool(wants_end), bool(wants_requeue)

    def _end(self) -> None:
        rank_zero_info("A process received SIGTERM: all ranks end the run before the next batch.")
        self._connector.received_sigterm = True
        raise SIGTERMException()


def _forget(owner: Any, name: str) -> None:
    vars(owner).pop(name, None)
