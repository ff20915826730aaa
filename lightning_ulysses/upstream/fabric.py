"""The private parts of Lightning's Fabric that this package uses, pinned by a test."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lightning.fabric.strategies.deepspeed import _get_deepspeed_engines_from_state
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from lightning.fabric.utilities.load import _move_state_into
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch import nn


class SyncControl(_BackwardSyncControl):
    """What `Fabric.no_backward_sync` asks, which refuses strategies that have none.

    Args:
        set_boundary: Is told whether an optimizer step follows the backwards from now on.
    """

    def __init__(self, set_boundary: Callable[[bool], None]) -> None:
        self._set_boundary = set_boundary

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """Around the forward and backward of a micro-batch; with ``enabled``, no optimizer step follows it."""
        return self._inside(enabled)

    @contextmanager
    def _inside(self, enabled: bool) -> Iterator[None]:
        self._set_boundary(not enabled)
        try:
            yield
        finally:
            self._set_boundary(True)


def seed_workers(loader: Any, rank: int) -> None:
    """Has the workers of a dataloader draw the numbers of another rank, where Fabric seeds them by this process's."""
    init = getattr(loader, "worker_init_fn", None)
    if isinstance(init, functools.partial) and init.func is pl_worker_init_function:
        loader.worker_init_fn = functools.partial(init.func, rank=rank)


def forward_zero_grad(optimizer: Any, before: Callable[[], None]) -> None:
    """Has ``zero_grad`` of Fabric's wrapper, which looks it up in the class, call that of the optimizer itself.

    Args:
        optimizer: DeepSpeed's, which may have a ``zero_grad`` of its own (``fabric/wrappers.py``, `_FabricOptimizer`).
        before: Called each time.
    """
    own = optimizer.zero_grad

    def zero_grad(self: Any, *args: Any, **kwargs: Any) -> None:
        before()
        own(*args, **kwargs)

    kind = type(optimizer)
    optimizer.__class__ = type(kind.__name__, (kind,), {"zero_grad": zero_grad})
    vars(optimizer).pop("zero_grad", None)


def engine_in(state: Mapping[str, Any]) -> Any:
    """The engine in what is saved or loaded; None unless there is exactly one, which Fabric refuses by itself."""
    engines = _get_deepspeed_engines_from_state(dict(state))
    return engines[0] if len(engines) == 1 else None


def move_state(source: dict[str, Any], destination: dict[str, Any]) -> None:
    """Moves loaded values to where the user wants them, and leaves the others in ``source``."""
    _move_state_into(source, destination, set(source) & set(destination) - {"optimizer", "lr_scheduler"})
