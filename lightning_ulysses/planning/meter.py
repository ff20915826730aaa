"""Counts the bytes of tensors that live, real ones and fake ones alike."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lightning_ulysses.upstream.torch_fake import Answers, is_plain_view, view_of

_DEVICE = torch.ops.prim.device.default

Workspace = Callable[[Any, tuple[Any, ...]], int]


@dataclass(frozen=True)
class Made:
    """A tensor when its memory was taken.

    Attributes:
        label: What ran.
        operator: Of torch, that returned it.
        shape: Of the tensor.
        dtype: Of the tensor, such as ``"bfloat16"``.
    """

    label: str
    operator: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Held:
    """Tensors alike that live at the peak.

    Attributes:
        made: What they are.
        is_kept: Whether they were made before the last mark that ended a phase, such as the forward.
        count: How many.
        bytes: Of all of them.
    """

    made: Made
    is_kept: bool
    count: int
    bytes: int


class Meter(TorchDispatchMode):
    """Counts the storages that are made while the mode is on, until they are freed.

    Args:
        device: Type of the device whose memory is counted.
        rounding: Each storage takes a multiple of so many bytes. CUDA's allocator rounds to 512.
        workspace: The bytes that a kernel takes while it runs besides what it returns.
        answers: Those of earlier rehearsals.

    Attributes:
        live: Bytes at this moment.
        peak: The most at any time.
        label: What runs at this moment.
        marks: What lived at moments that a caller took note of.
    """

    def __init__(
        self,
        device: str = "cpu",
        rounding: int = 1,
        workspace: Workspace | None = None,
        answers: Answers | None = None,
    ) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.label = "other"
        self.marks: list[int] = []
        self._device, self._rounding, self._workspace = device, rounding, workspace
        self._answers = Answers() if answers is None else answers
        self._made: list[Made] = []
        # Numbers of `_made`, with the bytes that came or went.
        self._events: list[tuple[int, int]] = []
        self._known: dict[int, tuple[Any, int, int]] = {}
        self._phase = 0
        self._ignored: dict[int, Any] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leaves tensors and their views out, such as those of the model."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            # Held, so that no other one takes its place.
            self._ignored[storage._cdata] = storage

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing compiles here, and each operator would pay for keeping it so.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator, and counts what it returns."""
        if func is _DEVICE:
            # Asked for more often than anything else is computed; only fake tensors have it asked by this way.
            return args[0].fake_device
        if is_plain_view(func, args, kwargs):
            # Most operators are views, which take no memory.
            return view_of(func, args)
        extra = self._workspace(func, args) if self._workspace is not None else 0
        answer = self._answers(func, args, kwargs or {})
        for leaf in tree_iter(answer):
            if isinstance(leaf, Tensor):
                self._note(leaf, func)
        if extra:
            number = self._new(Made(self.label, f"workspace of {_name(func)}", (extra,), "uint8"))
            self._change(number, extra)
            self._change(number, -extra)
        return answer

    def _note(self, tensor: Tensor, func: Any) -> None:
        if tensor.device.type != self._device:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // self._rounding) * self._rounding
        if key in self._ignored:
            return
        known = self._known.get(key)
        if known is not None:
            reference, number, before = known
            # A storage that is resized.
            if size != before:
                self._known[key] = reference, number, size
                self._change(number, size - before)
            return
        dtype = str(tensor.dtype).removeprefix("torch.")
        number = self._new(Made(self.label, _name(func), tuple(tensor.shape), dtype))
        self._known[key] = weakref.ref(storage, lambda _: self._gone(key)), number, size
        self._change(number, size)

    def _gone(self, key: int) -> None:
        _, number, size = self._known.pop(key)
        self._change(number, -size)

    def _new(self, made: Made) -> int:
        self._made.append(made)
        return len(self._made) - 1

    def _change(self, number: int, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)
        self._events.append((number, size))

    def end_phase(self) -> None:
        """Tensors that live now count as kept for what follows."""
        self._phase = len(self._events)

    def at_peak(self) -> list[Held]:
        """What lived at the first moment of the peak, the largest first."""
        live, most, where = 0, 0, 0
        for place, (_, size) in enumerate(self._events, 1):
            live += size
            if live > most:
                most, where = live, place
        held: dict[int, int] = {}
        for number, size in self._events[:where]:
            held[number] = held.get(number, 0) + size
        kept = {number for number, _ in self._events[: self._phase]}
        groups: dict[tuple[Made, bool], list[int]] = {}
        for number, size in held.items():
            if size:
                groups.setdefault((self._made[number], number in kept), []).append(size)
        found = [Held(made, is_kept, len(sizes), sum(sizes)) for (made, is_kept), sizes in groups.items()]
        return sorted(found, key=lambda each: -each.bytes)


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))


@contextmanager
def labelled(meter: Meter, label: Callable[[torch.nn.Module], str | None]) -> Iterator[None]:
    """Sets the label of what is made while a module runs. The innermost module with a label counts.

    Args:
        meter: Takes the labels.
        label: That of a module, or None for that of the module around it.
    """
    stack: list[str] = []

    def push(module: torch.nn.Module, args: Any) -> None:
        stack.append(meter.label)
        meter.label = label(module) or meter.label

    def pop(module: torch.nn.Module, args: Any, output: Any) -> None:
        meter.label = stack.pop()

    handles = [
        torch.nn.modules.module.register_module_forward_pre_hook(push),
        torch.nn.modules.module.register_module_forward_hook(pop, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
