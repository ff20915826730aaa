"""The logits of a head as hidden states: they are computed tile by tile in a cross entropy, and whole for others."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_ulysses.divided.tensor import changes_first, name_of
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.memory.head import Head, Step
from lightning_ulysses.memory.tiles import Conditions, Unwritten

# What a tensor knows without its elements.
_FACTS = {
    "shape", "dtype", "device", "layout", "ndim", "size", "dim", "ndimension", "numel", "nelement", "is_cuda", "is_cpu",
    "element_size", "get_device", "is_meta", "is_floating_point", "is_complex", "__len__", "__hash__", "__class__",
    "requires_grad", "is_sparse", "is_nested", "is_quantized", "is_mps", "is_xpu", "grad", "is_inference",
}  # fmt: skip
# Functions of each element by itself, applied to every tile where their other arguments are numbers.
_STEPS = {
    "float", "double", "half", "bfloat16", "to", "mul", "multiply", "div", "divide", "true_divide", "add", "sub", "neg",
    "tanh", "clamp", "clamp_min", "clamp_max", "__mul__", "__rmul__", "__truediv__", "__add__", "__radd__", "__sub__",
    "__neg__",
}  # fmt: skip
_SHAPES = {"view", "reshape", "flatten", "unflatten", "contiguous"}
# What they return has no gradient, so neither need the logits.
_WITHOUT_GRADIENT = {"detach", "argmax"}

View = Callable[[Tensor], Tensor]


def _unwritten(hidden: Tensor) -> Unwritten:
    return Unwritten([hidden], "their logits were computed", "go on with logits.clone(), or set tiled_loss=False")


class Source:
    """Logits that several views may share.

    Args:
        head: Computes them.
        hidden: (..., D)
        steps: What is done to each element after the head.
        dtype: Of the logits after the steps.
        has_graph: Whether a gradient of them reaches the hidden states and the head.
        conditions: Of the call of the head; those of this moment by default.
    """

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        steps: tuple[Step, ...],
        dtype: torch.dtype,
        has_graph: bool,
        conditions: Conditions | None = None,
    ) -> None:
        self.head = head
        self.hidden = hidden
        self.steps = steps
        self.dtype = dtype
        self.has_graph = has_graph and torch.is_grad_enabled()
        self.conditions = conditions or Conditions.now(head.module, hidden.device.type)
        self.unwritten = _unwritten(hidden)
        self.members: list[weakref.ref[DeferredLogits]] = []

    def compute(self) -> Tensor:
        """All of them, (..., V)."""
        self.unwritten.check()
        return self.recipe()(self.head.whole, self.hidden)

    def recipe(self) -> Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]:
        """Computes logits of hidden states by way of a function, the head. It does not hold those of this source."""
        steps, conditions = self.steps, self.conditions

        def compute(call: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
            with conditions.again():
                logits = call(hidden)
                for step in steps:
                    logits = step(logits)
            return logits

        return compute


class DeferredLogits(Tensor):
    """The logits for whoever asks for their shape, and the hidden states in memory.

    Attributes:
        source: What they are computed of.
        hidden: The hidden states of these rows, (..., D).
        views: How these rows come out of all logits of the source.
        unwritten: Sees whether the hidden states are written to.
        computed: The logits, once something needed them.
    """

    #: Answers a cross entropy of rows of logits (N, V); NotImplemented where only all logits will do.
    cross_entropy: ClassVar[Callable[..., Any]]
    source: Source
    hidden: Tensor
    views: tuple[View, ...]
    unwritten: Unwritten
    computed: Tensor | None

    @staticmethod
    def __new__(
        cls, source: Source, hidden: Tensor, shape: Any, views: tuple[View, ...] = (), needs_grad: bool | None = None
    ) -> DeferredLogits:
        """Logits of ``hidden``, of the shape ``shape``; a view of them may need no gradient."""
        needs_grad = source.has_graph if needs_grad is None else needs_grad
        made: DeferredLogits = Tensor._make_wrapper_subclass(
            cls, shape, dtype=source.dtype, device=hidden.device, requires_grad=needs_grad
        )
        made.source, made.hidden, made.views, made.computed = source, hidden, views, None
        made.unwritten = _unwritten(hidden)
        source.members.append(weakref.ref(made))
        if needs_grad:
            with torch._C.DisableTorchFunctionSubclass():
                made.register_hook(_lost)
        return made

    def __init__(self, *args: Any) -> None:
        pass

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """The shape, without the logits."""
        return f"DeferredLogits(shape={tuple(self.shape)})"

    def touched(self, function: Callable[[Tensor], Tensor]) -> DeferredLogits:
        """The same logits of hidden states to which a function that changes nothing was applied."""
        if self.computed is not None or self.views:
            return self
        hidden = function(self.hidden)
        source = Source(
            self.source.head, hidden, self.source.steps, self.dtype, self.requires_grad, self.source.conditions
        )
        return DeferredLogits(source, hidden, self.shape)

    def whole(self, keeps_graph: bool = True) -> Tensor:
        """The logits themselves, computed once.

        Args:
            keeps_graph: False for whoever needs no gradient, even where gradients are enabled.
        """
        needs_graph = keeps_graph and self.requires_grad and torch.is_grad_enabled()
        if self.computed is not None or needs_graph or not self.source.has_graph:
            return self.shared()
        with torch.no_grad():
            return self._viewed(self.source.compute(), {})

    def shared(self) -> Tensor:
        """The logits themselves, in memory that all views of them share."""
        if self.computed is not None:
            return self.computed
        seen = dict[View, Tensor]()
        with torch.set_grad_enabled(self.source.has_graph):
            logits = self.source.compute()
        for reference in self.source.members:
            member = reference()
            if member is not None:
                member.computed = member._viewed(logits, seen)
        # It is one of the members itself.
        return cast(Tensor, self.computed)

    def _viewed(self, logits: Tensor, seen: dict[View, Tensor]) -> Tensor:
        # Views that several members share are made once, so that what is written to one is seen by all.
        for view in self.views:
            if view not in seen:
                seen[view] = view(logits)
            logits = seen[view]
        return logits

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Takes note of ``func``, runs it tile by tile, or runs it on the logits."""
        name, kwargs = name_of(func), kwargs or {}
        if name in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        deferred = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, DeferredLogits)]
        first = args[0] if args else None
        if isinstance(first, DeferredLogits) and first.computed is None and len(deferred) == 1:
            answer = _deferred(name, func, first, args[1:], kwargs)
            if answer is not NotImplemented:
                return answer
        return _on_whole(name, func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Refuses what does not ask `__torch_function__`."""
        raise NotImplementedError(f"{func} on logits that are computed tile by tile")


def realized(values: Any) -> Any:
    """Nested values with the logits themselves in place of each deferred one."""
    return tree_map(lambda leaf: leaf.whole() if isinstance(leaf, DeferredLogits) else leaf, values)


def _lost(gradient: Tensor) -> None:
    raise UlyssesError(
        "a torch.autograd.Function that was applied to the logits of a head under tiled_loss",
        "functions of torch, such as torch.nn.functional.cross_entropy, whose gradients reach the hidden states",
        "apply it to logits.clone(), which are computed whole, or set tiled_loss=False",
    )


def _on_whole(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    first = args[0] if args else None
    writes = changes_first(name) and isinstance(first, DeferredLogits)
    keeps_graph = name not in _WITHOUT_GRADIENT

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, DeferredLogits):
            return leaf
        if leaf.computed is None:
            leaf.source.head.note(name)
        # The backward of a reentrant checkpoint runs where gradients are disabled.
        shares = (writes and leaf is first) or name == "backward"
        return leaf.shared() if shares else leaf.whole(keeps_graph)

    new_args, new_kwargs = tree_map(whole, (args, kwargs))
    answer = func(*new_args, **new_kwargs)
    if isinstance(first, DeferredLogits) and writes and answer is new_args[0] and answer.shape == first.shape:
        return first
    return answer


def _deferred(name: str, func: Any, first: DeferredLogits, rest: Any, kwargs: Any) -> Any:
    first.unwritten.check()
    if name == "cross_entropy":
        return DeferredLogits.cross_entropy(func, first, *rest, **kwargs)
    if name in _SHAPES:
        return _reshaped(func, first, rest, kwargs)
    if name == "__getitem__":
        return _indexed(first, rest[0])
    return _stepped(func, first, rest, kwargs) if name in _STEPS else NotImplemented


def _reshaped(func: Any, first: DeferredLogits, rest: Any, kwargs: Any) -> Any:
    probe = func(torch.empty(first.shape, dtype=first.dtype, device="meta"), *rest, **kwargs)
    if probe.dtype != first.dtype or probe.dim() == 0 or probe.shape[-1] != first.shape[-1]:
        return NotImplemented
    # (..., D): rows keep their order where the last dimension stays.
    hidden = first.hidden.reshape(*probe.shape[:-1], first.hidden.shape[-1])
    return _view(first, hidden, probe.shape, lambda logits: func(logits, *rest, **kwargs))


def _indexed(first: DeferredLogits, index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    if any(not isinstance(part, (int, slice, Tensor, type(None), type(...))) for part in parts):
        return NotImplemented
    consumed = sum(_consumed(part) for part in parts)
    # The last dimension is left alone, or named and taken whole.
    names_last = consumed == first.dim() or (any(part is ... for part in parts) and parts[-1] is not ...)
    last = parts[-1] if parts else None
    if names_last and not (isinstance(last, slice) and last == slice(None)):
        return NotImplemented
    hidden = first.hidden[index]
    shape = (*hidden.shape[:-1], first.shape[-1])
    return _view(first, hidden, shape, lambda logits: logits[index])


def _consumed(part: Any) -> int:
    """Dimensions that one part of an index stands for."""
    if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8):
        return part.dim()
    return int(part is not None and part is not ...)


def _view(first: DeferredLogits, hidden: Tensor, shape: Any, view: View) -> DeferredLogits:
    needs_grad = first.requires_grad and torch.is_grad_enabled()

    def same(logits: Tensor) -> Tensor:
        with torch.set_grad_enabled(needs_grad):
            return view(logits)

    return DeferredLogits(first.source, hidden, shape, (*first.views, same), needs_grad)


def _stepped(func: Any, first: DeferredLogits, rest: Any, kwargs: Any) -> Any:
    others = tree_leaves((rest, kwargs))
    if any(isinstance(other, Tensor) and (other.dim() or other.requires_grad) for other in others):
        return NotImplemented
    if kwargs.get("out") is not None:
        return NotImplemented
    # Later writes to a number on a device must not change what was computed.
    rest, kwargs = tree_map(lambda each: each.clone() if isinstance(each, Tensor) else each, (rest, kwargs))
    empty = torch.empty(0, dtype=first.dtype, device=first.device)
    result = func(empty, *rest, **kwargs)
    if result is empty:
        return first
    if result.device != first.device:
        return NotImplemented
    steps = (*first.source.steps, lambda logits: func(logits, *rest, **kwargs))
    source = Source(first.source.head, first.hidden, steps, result.dtype, first.requires_grad, first.source.conditions)
    return DeferredLogits(source, first.hidden, first.shape)


def signature_of(func: Any) -> inspect.Signature:
    """The signature of ``torch.nn.functional.cross_entropy``."""
    return inspect.signature(func)
