"""A block of a model that keeps its inputs alone, and is computed again in the backward."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from lightning_ulysses.attention.kept import Keeper, KeptAttention, Ledger
from lightning_ulysses.context import SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.memory.blocks import already
from lightning_ulysses.memory.offload import HostOffload
from lightning_ulysses.memory.replaced import Replaced
from lightning_ulysses.notes import is_plain
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.patching.outside_graphs import eager


class Checkpoints:
    """What is checkpointed at this moment.

    Attributes:
        block: The block that runs.
        by_user: The function by which the user checkpoints what runs.
    """

    def __init__(self) -> None:
        self.block: str | None = None
        self.by_user: str | None = None
        self._is_own = False

    def own(self, *args: Any) -> Any:
        """Checkpoints a call, by the function that plans and trials have put in torch's place."""
        self._is_own = True
        try:
            return torch.utils.checkpoint.checkpoint(*args, use_reentrant=False)
        finally:
            self._is_own = False

    def watch(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The function in the place of ``original``, one of those by which users checkpoint.

        Raises:
            UlyssesError: From the function, inside of a block.
        """
        name = f"{original.__module__}.{getattr(original, '__name__', 'checkpoint')}"

        @functools.wraps(original)
        def checkpoint(*args: Any, **kwargs: Any) -> Any:
            if self._is_own:
                self._is_own = False
                return original(*args, **kwargs)
            if self.block is not None:
                raise already(self.block, f"in part, by {name} inside of it")
            before, self.by_user = self.by_user, name
            try:
                return original(*args, **kwargs)
            finally:
                self.by_user = before

        return checkpoint

    @contextmanager
    def inside(self, block: str) -> Iterator[None]:
        """While a block runs."""
        before, self.block = self.block, block
        try:
            yield
        finally:
            self.block = before


@dataclass(frozen=True)
class _Place:
    """The place of a tensor among those that are kept."""

    index: int


class _Copy:
    """A list or a dict as it was before the block ran, which may change it."""

    def __init__(self, value: list[Any] | dict[Any, Any]) -> None:
        self.original = value
        self._before = value.copy()
        self._is_first = True

    def get(self) -> Any:
        if self._is_first:
            self._is_first = False
            return self.original
        return self._before.copy()


class _Arguments:
    """The arguments of a block, without the tensors that its checkpoint keeps.

    Args:
        name: Of the block, for messages.
        args: By position.
        kwargs: By name.
    """

    def __init__(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._name = name
        self.tensors: list[Tensor] = []
        self.is_plain = True
        self._device: Tensor | None = None
        self._args = tuple(map(self._lift, args))
        self._kwargs = {key: self._lift(value) for key, value in kwargs.items()}

    def take(self) -> list[Tensor]:
        """The tensors for the checkpoint, which are not held here from now on."""
        taken, self.tensors = self.tensors, []
        # One at least: it tells torch's checkpoint of which device random numbers are restored.
        taken = taken or [each for each in (self._device,) if each is not None]
        self._device = None
        return taken

    def _lift(self, value: Any) -> Any:
        if type(value) is tuple:
            return tuple(map(self._lift, value))
        if type(value) in (list, dict):
            return _Copy(value)
        return self._lift_tensor(value) if isinstance(value, Tensor) else self._without_cache(value)

    def _lift_tensor(self, value: Tensor) -> Any:
        # A subclass stands for something else, such as a sequence that is divided over ranks.
        self.is_plain &= is_plain(value)
        if not is_plain(value) or isinstance(value, nn.Parameter):
            return value
        self._device = value if self._device is None else self._device
        if not value.requires_grad:
            return value
        self.tensors.append(value)
        return _Place(len(self.tensors) - 1)

    def _without_cache(self, value: Any) -> Any:
        caches: Any = sys.modules.get("transformers.cache_utils")
        if caches is None or not isinstance(value, caches.Cache):
            return value
        # A block that is computed again would add its keys twice. transformers leaves them out of checkpoints as well.
        if value.get_seq_length():
            raise UlyssesError(
                f"a cache of {value.get_seq_length()} keys for the checkpointed block {self._name!r}",
                "training without keys of an earlier call",
                "call the model without past_key_values, or set checkpoint='none' in memory",
            )
        return None

    def put(self, tensors: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named arguments with ``tensors`` in their places."""
        args = tuple(self._fill(value, tensors) for value in self._args)
        return args, {key: self._fill(value, tensors) for key, value in self._kwargs.items()}

    # No function in `put`: one that calls itself would hold the tensors until Python collects cycles.
    def _fill(self, value: Any, tensors: tuple[Tensor, ...]) -> Any:
        if type(value) is tuple:
            return tuple(self._fill(each, tensors) for each in value)
        if isinstance(value, _Copy):
            return value.get()
        return tensors[value.index] if isinstance(value, _Place) else value


class CheckpointedBlock:
    """The forward of one block under a checkpoint.

    Args:
        context: Tells whether the step is being tried; then the block runs as it was written.
        name: Of the block.
        module: The block.
        checkpoints: What is checkpointed at this moment.
        keeper: Where attention outputs wait for the backward; None if attention is computed again.
        offload: Where inputs wait for the backward; None if they stay on the device.
    """

    def __init__(
        self,
        context: SequenceContext,
        name: str,
        module: nn.Module,
        checkpoints: Checkpoints,
        keeper: Keeper | None,
        offload: HostOffload | None,
    ) -> None:
        self.name = name
        self.context = context
        self.checkpoints = checkpoints
        self.keeper = keeper
        self.offload = offload
        self.plain: Callable[..., Any] = module.forward
        self._module = module
        self._is_checked = False

    def install(self) -> Handle:
        """Replaces the forward, or the compiled call, which is checkpointed as a whole."""
        handle = Handle()
        method = "forward" if self._module._compiled_call_impl is None else "_compiled_call_impl"
        replaced = Replaced(self._module, method, eager(self._forward))
        self.plain = replaced.original
        replaced.put(handle)
        return handle

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.context.place.takes_calls or self.checkpoints.block is not None:
            return self.plain(*args, **kwargs)
        if self.checkpoints.by_user is not None:
            raise already(self.name, f"by {self.checkpoints.by_user}")
        if not torch.is_grad_enabled():
            return self.plain(*args, **kwargs)
        given = _Arguments(self.name, args, kwargs)
        needs = any(each.requires_grad for each in (*given.tensors, *self._module.parameters()))
        tensors = given.take()
        if not given.is_plain or not tensors or not needs:
            return self.plain(*args, **kwargs)
        del args, kwargs
        return self._checkpointed(given, tensors)

    def _checkpointed(self, given: _Arguments, tensors: list[Tensor]) -> Any:
        run, offload = _Run(self, given), self.offload
        if offload is None:
            return self.checkpoints.own(run, *tensors)
        offload.begin(tensor for tensor in tensors if tensor.requires_grad)
        with torch.autograd.graph.saved_tensors_hooks(offload.pack, offload.unpack):
            output = self.checkpoints.own(run, *tensors)
        offload.end()
        return output

    def say(self, reason: str) -> None:
        """Says once that some attention is computed twice."""
        if self.context.mesh.rank == 0:
            self.context.notes.of(KeptAttention).say(reason)

    def checked(self) -> AbstractContextManager[None]:
        """Around the first call of all: refuses a block that would write to its buffers twice."""
        if self._is_checked:
            return nullcontext()
        self._is_checked = True
        return self._buffers_kept()

    @contextmanager
    def _buffers_kept(self) -> Iterator[None]:
        before = [(name, buffer, buffer.detach().clone()) for name, buffer in self._module.named_buffers()]
        yield
        written = [name for name, buffer, value in before if not torch.equal(buffer, value)]
        if written:
            raise UlyssesError(
                f"checkpoint in memory for {self.name!r} ({type(self._module).__name__}), which writes to its buffer "
                f"{written[0]!r}",
                "a block without side effects, since it is computed twice in a step",
                "give checkpoint_blocks the names of other submodules, or set checkpoint='none'",
            )


class _Run:
    """One call of a block, and each time that it is computed again."""

    def __init__(self, block: CheckpointedBlock, given: _Arguments) -> None:
        self._block = block
        self._given = given
        self._kept = block.context.notes.of(KeptAttention)
        self._ledger = None if block.keeper is None else Ledger(block.keeper, block.say)
        self._draws = _host_draws()
        self._is_first = True

    def __call__(self, *tensors: Tensor) -> Any:
        is_first, self._is_first = self._is_first, False
        if not is_first and self._ledger is not None:
            self._ledger.rewind()
        block = self._block
        args, kwargs = self._given.put(tensors)
        with (
            block.checkpoints.inside(block.name),
            self._kept.within(self._ledger),
            block.checked() if is_first else _drawing(self._draws),
        ):
            return block.plain(*args, **kwargs)


def _host_draws() -> tuple[Any, Any]:
    # Looked up, not imported: the program may not have loaded NumPy.
    numpy: Any = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state()


def _set_host_draws(states: tuple[Any, Any]) -> None:
    random.setstate(states[0])
    if states[1] is not None:
        sys.modules["numpy"].random.set_state(states[1])


@contextmanager
def _drawing(states: tuple[Any, Any]) -> Iterator[None]:
    """Draws of Python and NumPy inside begin with ``states``; torch's checkpoint does as much for its own."""
    now = _host_draws()
    _set_host_draws(states)
    try:
        yield
    finally:
        _set_host_draws(now)
