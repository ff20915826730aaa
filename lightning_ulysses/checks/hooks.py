"""Refuses hooks that read or write what ZeRO keeps elsewhere, by looking at what they touch.

Between backward and step, ``p.grad`` is None or this rank's own part, and what is done with it leaves no trace in the
step. At stage 3, a parameter is empty outside of the modules' calls. While user code may run there, parameters are
instances of a subclass that takes note of both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ulysses.errors import UlyssesError

# Lightning's module that calls all hooks, and its functions that do.
_CALLER = "lightning.pytorch.trainer.call"
_CALLS = ("_call_callback_hooks", "_call_lightning_module_hook")
_LOADS = "_load_from_state_dict"
_NOT_USERS = ("lightning", "pytorch_lightning", "lightning_ulysses")


class HookWatch:
    """Takes note of the first hook that touches gradients or released parameters, and refuses it on all ranks.

    Args:
        module: The user's module.
        groups: Returns the optimizer's parameters, which are flat copies of the module's.
        device: The device of the collectives.
        is_partitioned: Whether parameters are empty where no module uses them.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Callable[[], Iterable[Tensor]],
        device: torch.device,
        is_partitioned: bool = False,
    ) -> None:
        self.is_partitioned = is_partitioned
        self._module = module
        self._groups = groups
        self._device = device
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._kinds: dict[type, type] = {}
        self._swapped: list[Tensor] = []
        self._found: UlyssesError | None = None
        self._agreed: set[str] = set()
        self._is_on = self._has_gradients = self._in_user_step = self._has_stepped = False

    def start(self) -> None:
        """Watches from now on, except while a step runs."""
        self._is_on = True
        self._open()

    def stop(self) -> None:
        """Watches nothing from now on."""
        self._close()
        self._is_on = False

    def _open(self) -> None:
        if not self._is_on or self._swapped:
            return
        flat = [tensor for tensor in self._groups() if id(tensor) not in self._names] if self._has_gradients else []
        self._swapped = [*self._module.parameters(), *flat]
        for tensor in self._swapped:
            kind = type(tensor)
            if kind not in self._kinds:
                self._kinds[kind] = _watched(kind, self)
            tensor.__class__ = self._kinds[kind]

    def _close(self) -> None:
        for tensor in self._swapped:
            kind: Any = type(tensor).__base__
            tensor.__class__ = kind
        self._swapped = []

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Watches nothing inside."""
        self._close()
        try:
            yield
        finally:
            self._open()

    @contextmanager
    def in_user_step(self, name: str) -> Iterator[None]:
        """Inside, a step of the module runs; hooks that were wrong before it are refused."""
        self.settle(name)
        self._in_user_step = True
        with self.closed(), self.explained():
            yield
        self._in_user_step = False

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        """Inside, gradients are computed; afterwards user code may run that edits them."""
        self._close()
        yield
        self._has_gradients = True
        self._open()

    @contextmanager
    def in_optimizer_step(self) -> Iterator[None]:
        """Inside, the optimizer steps; hooks that were wrong before it are refused."""
        self.settle("step")
        self._close()
        yield
        self._has_gradients, self._has_stepped = False, True
        if not self._in_user_step:
            self._open()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Inside, hooks run that may fail at what is not there."""
        try:
            yield
        except UlyssesError:
            raise
        except Exception as failure:
            if self._found is None:
                raise
            self.settle("step", failure)

    def settle(self, place: str, cause: BaseException | None = None) -> None:
        """Raises what was found; a collective until each place has been passed and the optimizer has stepped.

        Args:
            place: The name of the place in a run.
            cause: What came of it.
        """
        found = self._found
        if self._is_on and place not in self._agreed and dist.get_world_size() > 1:
            flag = torch.tensor([found is not None], dtype=torch.int32, device=self._device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            if flag:
                everyone: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(everyone, found)
                found = found or next(error for error in everyone if error is not None)
            if place != "training_step" or self._has_stepped:
                self._agreed.add(place)
        if found is not None:
            self._found = None
            raise found from cause

    def saw_gradient(self, tensor: Tensor) -> None:
        """Takes note that somebody reads or sets a gradient."""
        hook = _hook() if self._has_gradients and self._found is None else None
        if hook is not None:
            self._found = UlyssesError(
                f"{hook}, which uses the .grad of {self._names.get(id(tensor), 'a parameter of the optimizer')}",
                "a hook that leaves .grad alone: under ZeRO it is None or a part, and the step does not use it",
                "set Trainer(gradient_clip_val=...) to clip, log train/grad_norm of TokenCountMonitor to watch; for "
                "anything else, at stage 1 or 2, call safe_get_full_grad and safe_set_full_grad of deepspeed.utils on "
                "every rank in on_before_optimizer_step",
            )

    def saw_weight(self, tensor: Tensor | None) -> UlyssesError | None:
        """Takes note that somebody writes a parameter that is not there."""
        hook = _hook() if tensor is not None else None
        if hook is None:
            return None
        error = UlyssesError(
            f"{hook}, which edits {self._names.get(id(tensor), 'a parameter')} while ZeRO stage 3 keeps a part "
            "of it on each rank",
            "a hook that gathers the parameters that it edits",
            "edit them inside deepspeed.zero.GatheredParameters(parameters, modifier_rank=0), load weights in setup or "
            "configure_model, or use stage 2",
        )
        self._found = self._found or error
        return error


def _hook() -> str | None:
    """The class and name of the user's hook that runs; None if something else uses a tensor."""
    frame = sys._getframe(3)
    while frame.f_back is not None and _package(frame) == "torch":
        frame = frame.f_back
    if _package(frame) == "deepspeed":
        return None
    while frame.f_back is not None:
        above = frame.f_back
        known = above.f_locals if above.f_globals.get("__name__") == _CALLER else {}
        # A step that optimises by hand edits gradients itself.
        if known and (above.f_code.co_name in _CALLS or known.get("hook_name") == "training_step"):
            owner = known.get("callback") or known["trainer"].lightning_module
            is_users = type(owner).__module__.split(".")[0] not in _NOT_USERS
            return f"{type(owner).__name__}.{known['hook_name']}" if is_users else None
        frame = above
    return None


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).split(".")[0]


def _released(args: Iterable[Any]) -> Tensor | None:
    """The first of some arguments that is a parameter without its numbers."""
    for arg in args:
        if isinstance(arg, (list, tuple)):
            found = _released(arg)
            if found is not None:
                return found
        elif isinstance(arg, Tensor) and arg.numel() != getattr(arg, "ds_numel", arg.numel()):
            return arg
    return None


def _may_write(function: Any, caller: str) -> bool:
    """Whether a function of torch may change numbers: one that works in place, ``.data``, or any in a load."""
    name = getattr(function, "__name__", "")
    if name in ("__get__", "__set__"):
        return getattr(function, "__self__", None) is Tensor.data or caller == _LOADS
    return name.endswith("_") and not name.endswith("__")


def _watched(kind: Any, watch: HookWatch) -> type:
    """A subclass of a class of tensors that tells a watch what is touched."""

    def get(self: Tensor) -> Any:
        watch.saw_gradient(self)
        return kind.grad.__get__(self)

    def put(self: Tensor, value: Any) -> None:
        watch.saw_gradient(self)
        kind.grad.__set__(self, value)

    def copied(self: Tensor, memo: dict[int, Any]) -> Any:
        result = kind.__deepcopy__(self, memo)
        result.__class__ = kind
        return result

    def call(cls: type, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            caller = sys._getframe(1).f_code.co_name
            error = watch.saw_weight(_released(args)) if _may_write(function, caller) else None
            # It would compare shapes, and fail without a word about ZeRO.
            if error is not None and caller == _LOADS:
                raise error
            try:
                return function(*args, **(kwargs or {}))
            except Exception as failure:
                if error is None:
                    raise
                raise error from failure

    members: dict[str, Any] = {"grad": property(get, put), "__deepcopy__": copied}
    is_partitioned = issubclass(kind, nn.Parameter) and watch.is_partitioned
    members["__torch_function__"] = classmethod(call) if is_partitioned else kind.__torch_function__
    if not issubclass(kind, nn.Parameter):
        members["__torch_function__"] = torch._C._disabled_torch_function_impl
    return type(kind.__name__, (kind,), members)
