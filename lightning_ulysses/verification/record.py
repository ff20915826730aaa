"""Records inputs and outputs of every submodule in a first step, and calls of torch that look along the sequence."""

from __future__ import annotations

import contextlib
import dataclasses
import linecache
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_ulysses.divided import Divided

_TORCH = str(Path(torch.__file__).parent) + os.sep
_OWN = str(Path(__file__).parents[1]) + os.sep
_PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "bmm", "einsum", "baddbmm"}
_SLICES = {"__getitem__", "narrow", "roll", "select"}
_RANDOM = {"rand", "randn", "rand_like", "randn_like", "randint", "bernoulli", "multinomial", "normal", "dropout"}
_ALONG = {"cumsum", "cumprod", "cummax", "flip", "sort", "logcumsumexp", "unfold", "roll"}
_LAYERS = {"conv1d", "conv2d", "conv3d", "batch_norm", "avg_pool1d", "max_pool1d", "interpolate", "instance_norm"}
_LAYERS |= {"lstm", "gru", "rnn_tanh", "rnn_relu"}
_REDUCTIONS = {"mean", "sum", "max", "min", "amax", "amin", "std", "var", "logsumexp", "prod"}


@dataclasses.dataclass
class Call:
    """One call of a module.

    Attributes:
        class_name: The module's class.
        is_own: Whether that class is not one of torch's.
        inputs: Its input tensors, by argument.
        outputs: Its output tensors, by path.
    """

    class_name: str
    is_own: bool = False
    inputs: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    outputs: dict[str, Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Suspect:
    """A call of torch that depends on where a slice of the sequence begins or ends.

    Attributes:
        kind: As in `Finding`.
        module: The innermost module that was running.
        operation: The function called.
        line: ``file:number: text`` of the code that called it.
    """

    kind: str
    module: str
    operation: str
    line: str


def tensors_of(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested containers, with its path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from tensors_of(part, f"{path}.{key}")
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value):
            yield from tensors_of(part, f"{path}.{index}")


def _is_foreign(frame: FrameType) -> bool:
    """Whether a frame belongs to torch, to generated code, or to the machinery of context managers."""
    name = frame.f_code.co_filename
    return name.startswith((_TORCH, "<")) or name in (__file__, contextlib.__file__)


def calling_line(through: bool) -> str | None:
    """The innermost line outside of torch.

    Args:
        through: Whether to look through this package to the line that called it. Otherwise a call by this package gives
            None.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (_is_foreign(frame) or (through and frame.f_code.co_filename.startswith(_OWN))):
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename.startswith(_OWN):
        return None
    name = frame.f_code.co_filename
    text = linecache.getline(name, frame.f_lineno).strip()
    path = os.path.relpath(name) if Path(name).is_relative_to(Path.cwd()) else name
    return f"{path}:{frame.f_lineno}: {text}"


class Watch(TorchFunctionMode):
    """Records calls that depend on where a slice begins or ends.

    Args:
        share: S_r.
        module: Returns the name of the innermost module that is running.
    """

    def __init__(self, share: int, module: Callable[[], str]) -> None:
        super().__init__()
        self.suspects: list[Suspect] = []
        self._share = share
        self._module = module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls ``func``, and records the call if it is suspect."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        kind = self._kind(name, args, kwargs or {}, result) if isinstance(result, (Tensor, tuple)) else None
        if kind is not None:
            # Dropout inside intercepted attention counts for the line that called attention. Other calls of this
            # package do not count.
            line = calling_line(through=kind == "random")
            suspect = Suspect(kind, self._module(), name, line or "")
            if line is not None and suspect not in self.suspects:
                self.suspects.append(suspect)
        return result

    def _kind(self, name: str, args: Any, kwargs: Any, result: Any) -> str | None:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        # dropout_p comes fifth, after query, key, value and mask.
        attention_dropout = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
        if name in _RANDOM or (name == "scaled_dot_product_attention" and attention_dropout):
            return "random"
        if name in _LAYERS:
            return "mixing"
        shape = tuple(result.shape) if isinstance(result, Tensor) else ()
        if name == "arange":
            return "positions" if shape == (self._share,) and int(result[0]) == 0 else None
        if name == "__getitem__" and first is not None and self._slices_a_table(first, args[1]):
            return "positions"
        if name in _PRODUCTS:
            # (..., S_r, S_r): scores of a slice with itself.
            return "attention" if len(shape) > 2 and shape[-2:] == (self._share, self._share) else None
        if first is None or self._share not in first.shape:
            return None
        # One token fewer than the slice: labels shifted against logits.
        if name in _SLICES and self._share - 1 in shape:
            return "labels"
        if name in _ALONG or (name in _REDUCTIONS and shape and self._share not in shape and first.dim() > 1):
            return "mixing"
        return None

    def _slices_a_table(self, table: Tensor, index: Any) -> bool:
        """Whether ``table[index]`` takes the first S_r entries of a longer table, as it then does on every rank."""
        if max(table.shape, default=0) <= self._share:
            return False
        slices = [part for part in (index if isinstance(index, tuple) else (index,)) if isinstance(part, slice)]
        return any((part.start or 0, part.stop, part.step or 1) == (0, self._share, 1) for part in slices)


class Recorder:
    """Hooks on every submodule of ``root`` that record its first call while the recorder is active.

    Args:
        root: The user's module. Its own call is not recorded.
    """

    def __init__(self, root: nn.Module) -> None:
        self.calls: dict[str, Call] = {}
        self.active = False
        self._open: list[str] = []
        self._kept: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self._hooks: list[Any] = []
        for name, module in root.named_modules():
            if name:
                before, after = self._before(name), self._after(name)
                self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
                self._hooks.append(module.register_forward_hook(after, with_kwargs=True))

    def current(self) -> str:
        """The name of the innermost module that is running; "" for the root."""
        return self._open[-1] if self._open else ""

    def remove(self) -> None:
        """Removes the hooks and drops the cache of copied tensors."""
        for hook in self._hooks:
            hook.remove()
        self._kept.clear()

    def _copy(self, tensor: Tensor) -> Tensor:
        # The output of one module is the input of the next: they share a copy, unless the tensor was written to in
        # between. The original is kept too, so that its address is not used again.
        if isinstance(tensor, Divided):
            # Joined anew each time, so its address says nothing.
            copy = tensor.whole().detach()
            return copy.float().cpu() if copy.is_floating_point() else copy.cpu()
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor._version)
        if key not in self._kept:
            copy = tensor.detach().clone()
            self._kept[key] = tensor.detach(), copy.float().cpu() if copy.is_floating_point() else copy.cpu()
        return self._kept[key][1]

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self.active:
                return
            self._open.append(name)
            if name not in self.calls:
                # `_after` moves it to the end, so that a module comes after those that it called.
                call = Call(type(module).__name__, not type(module).__module__.startswith("torch."))
                given = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
                call.inputs = {path: self._copy(tensor) for path, tensor in tensors_of(given)}
                self.calls[name] = call

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not self.active:
                return
            # Modules above it on the stack ended by an exception, without their hook.
            while self._open and self._open.pop() != name:
                pass
            call = self.calls[name]
            if not call.outputs:
                call.outputs = {path: self._copy(tensor) for path, tensor in tensors_of(output)}
                # Moves it to the end: calls are in the order in which they return.
                self.calls[name] = self.calls.pop(name)

        return hook
