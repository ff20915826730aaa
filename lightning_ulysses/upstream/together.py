"""The part of the strategy by which all ranks end a run together: at a signal, or because one of them has failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from lightning.pytorch.strategies.deepspeed import DeepSpeedStrategy
from typing_extensions import override

from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.upstream.failing import FailedRun
from lightning_ulysses.upstream.signals import SignalWatch

if TYPE_CHECKING:
    import lightning.pytorch as pl

T = TypeVar("T")


class EndsTogether(DeepSpeedStrategy):
    """Strategy whose ranks act together on signals, and never wait for one that has failed."""

    _failed: FailedRun | None = None
    _signals: SignalWatch | None = None
    _signal_handle: Handle | None = None

    @override
    def setup_distributed(self) -> None:
        """Connects the processes, and gives the run a name that it shares with no other."""
        super().setup_distributed()
        assert self.lightning_module is not None
        self._failed = FailedRun(self.lightning_module.trainer, self.broadcast(uuid4().hex))

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        """Takes over Lightning's signal handlers, which it registers after this."""
        if trainer.world_size > 1:
            self._release_signals()
            self._signals = SignalWatch(trainer, self.root_device, self.host_group)
            self._signal_handle = self._signals.start()
        super().setup(trainer)

    def host_group(self) -> Any:
        """All ranks, for tensors on the host; None if there is no such group beside the one of the device."""
        return getattr(getattr(self, "_mesh", None), "host_group", None)

    def evaluates_in_step(self) -> bool:
        """Whether all ranks have equally many batches in the evaluation that begins; a collective."""
        return False

    def _begin_evaluation(self) -> None:
        in_step = self.evaluates_in_step()
        if self._signals is not None:
            self._signals.in_step = in_step

    @override
    def on_validation_start(self) -> None:
        """Prepares `agree_in_evaluation`."""
        self._begin_evaluation()

    @override
    def on_test_start(self) -> None:
        """Prepares `agree_in_evaluation`."""
        self._begin_evaluation()

    @override
    def on_predict_start(self) -> None:
        """Prepares `agree_in_evaluation`."""
        self._begin_evaluation()

    def agree_in_evaluation(self) -> None:
        """Ends the run before an evaluation batch if a process received SIGTERM."""
        if self._signals is not None:
            self._signals.agree_in_evaluation()

    @property
    def _is_alone(self) -> bool:
        return self._failed is not None and self._failed.is_alone

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Saves, unless this rank has failed and others do not come to save with it."""
        if self._is_alone and self._failed is not None:
            self._failed.warn_unsaved(filepath)
        else:
            super().save_checkpoint(checkpoint, filepath, storage_options)

    # Callbacks call these around a checkpoint, and a rank that has failed alone would wait in them.

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Waits for all ranks, unless this one has failed alone."""
        if not self._is_alone:
            super().barrier(*args, **kwargs)

    @override
    def broadcast(self, obj: T, src: int = 0) -> T:
        """The object of another rank, or this rank's own if it has failed alone."""
        return obj if self._is_alone else super().broadcast(obj, src)

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """The values of all ranks in one, or this rank's own if it has failed alone."""
        return tensor if self._is_alone else super().reduce(tensor, group, reduce_op)

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Has a refusal shown once, and processes that this one has started end with it."""
        super().on_exception(exception)
        if self._failed is not None:
            self._failed.leave(exception)

    @override
    def teardown(self) -> None:
        """Gives Lightning its handlers back."""
        self._release_signals()
        super().teardown()

    def _release_signals(self) -> None:
        if self._signal_handle is not None:
            self._signal_handle.remove()
        self._signals = self._signal_handle = None
