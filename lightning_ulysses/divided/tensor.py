"""The tensor that stands for a whole sequence while each rank of a group holds a slice of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.cut_and_join import join_shares
from lightning_ulysses.exchange.mesh import SequenceMesh

# A function, its arguments and keyword arguments. Answers NotImplemented where only the joined sequence will do.
Rule = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

# What a tensor knows without its elements.
_FACTS = {
    "shape", "dtype", "device", "layout", "ndim", "names", "size", "dim", "ndimension", "numel", "nelement", "is_cuda",
    "element_size", "get_device", "is_cpu", "is_mps", "is_xpu", "is_meta", "is_sparse", "is_nested", "is_quantized",
    "is_floating_point", "is_complex", "__len__", "__hash__", "__class__",
}  # fmt: skip
# What concerns the graph, which is that of the slice.
_OF_GRAPH = {"requires_grad", "grad_fn", "is_leaf", "requires_grad_", "retain_grad", "output_nr", "is_inference"}
# Operators that change their tensor, beside methods whose names end with an underscore.
_INTO = {
    "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__idiv__", "__imod__", "__ipow__", "__iand__",
    "__ior__", "__ixor__", "__ilshift__", "__irshift__",
}  # fmt: skip

# Where the slice of each rank begins in a row of tokens, and the end of the last one. A slice may be empty.
Bounds = tuple[int, ...]


@dataclass(frozen=True)
class Division:
    """How a tensor is divided over the ranks of a group.

    Attributes:
        dim: The dimension that carries the sequence.
        rows: The bounds of each row that lies in this dimension: B equal ones in (B * S, V), one in (B, S, V), and
            unequal ones where a mask has picked tokens.
        mesh: Sizes and groups.
    """

    dim: int
    rows: tuple[Bounds, ...]
    mesh: SequenceMesh = field(compare=False)

    @property
    def seq_len(self) -> int | None:
        """S; None where rows have several lengths."""
        return self.rows[0][-1] if self.is_even else None

    @property
    def is_even(self) -> bool:
        """Whether all rows are divided alike."""
        return all(row == self.rows[0] for row in self.rows)

    @property
    def size(self) -> int:
        """Of `dim` in the whole."""
        return sum(row[-1] for row in self.rows)

    @property
    def shares(self) -> tuple[int, ...]:
        """Of `dim` on each rank."""
        return tuple(sum(row[rank + 1] - row[rank] for row in self.rows) for rank in range(self.mesh.sp_size))

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Begin and end of this rank's slice in each row."""
        rank = self.mesh.sp_rank
        return tuple((row[rank], row[rank + 1]) for row in self.rows)

    def cut(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's slice of a whole tensor whose dimension ``dim`` is the divided one."""
        begin, end = self.spans[0]
        if len(self.rows) == 1:
            return whole.narrow(dim, begin, end - begin)
        if self.is_even:
            # (..., B * S, ...) -> (..., B, S, ...) -> (..., B, S_r, ...) -> (..., B * S_r, ...)
            apart = whole.unflatten(dim, (len(self.rows), self.rows[0][-1])).narrow(dim + 1, begin, end - begin)
            return apart.flatten(dim, dim + 1)
        parts = whole.split([row[-1] for row in self.rows], dim)
        spans = zip(parts, self.spans, strict=True)
        return torch.cat([part.narrow(dim, begin, end - begin) for part, (begin, end) in spans], dim)

    def join(self, part: Tensor) -> Tensor:
        """All slices; a collective in forward and backward."""
        dim, rank, group = self.dim, self.mesh.sp_rank, self.mesh.sp_group
        assert group is not None
        is_bool = part.dtype is torch.bool
        # Backends exchange no booleans.
        part = part.byte() if is_bool else part
        whole = join_shares(part, dim, self.shares, rank, group)
        if len(self.rows) > 1:
            # Ranks' rows one after the other -> rows
            whole = whole.index_select(dim, self._order(whole.device))
        return whole.bool() if is_bool else whole

    def _order(self, device: torch.device) -> Tensor:
        """Where each token of the whole is among the slices of all ranks, (size,)."""
        numbers = torch.arange(self.size)
        ranks = range(self.mesh.sp_size)
        of_ranks = [replace(self, mesh=replace(self.mesh, sp_rank=rank)).cut(numbers, 0) for rank in ranks]
        return torch.cat(of_ranks).argsort().to(device)

    def at(self, dim: int) -> Division:
        """The same slices along another dimension."""
        return replace(self, dim=dim)


class Divided(Tensor):
    """The whole of a sequence for whoever asks for its shape, and a slice of it in memory.

    Functions for which there is a rule run on slices; all others run on the joined sequence. Gradients stay exact, as
    `exchange.cut_and_join` says: the backward of every exchange is its adjoint.
    """

    rules: ClassVar[dict[str, Rule]] = {}
    local: Tensor
    division: Division

    @staticmethod
    def __new__(cls, local: Tensor, division: Division) -> Divided:
        """The sequence of which ``local`` is this rank's slice."""
        assert local.shape[division.dim] == division.shares[division.mesh.sp_rank]
        shape = list(local.shape)
        shape[division.dim] = division.size
        needs_grad = local.requires_grad and torch.is_grad_enabled()
        made: Divided = Tensor._make_wrapper_subclass(
            cls, shape, dtype=local.dtype, device=local.device, requires_grad=needs_grad
        )
        made.local, made.division = local, division
        if needs_grad:
            with torch._C.DisableTorchFunctionSubclass():
                made.register_hook(_lost)
        return made

    def __init__(self, local: Tensor, division: Division) -> None:
        pass

    def whole(self) -> Tensor:
        """All of it, on every rank; a collective."""
        return self.division.join(self.local)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Shape and division, without a collective."""
        return f"Divided(shape={tuple(self.shape)}, dim={self.division.dim}, rows={self.division.rows})"

    @classmethod
    # Compiled code ends its graph where it meets one.
    @torch.compiler.disable
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs ``func`` on slices, or on what they are slices of."""
        name, kwargs = name_of(func), kwargs or {}
        if name in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name == "register_hook":
            return _hooked(*args)
        if name in _OF_GRAPH:
            return func(*of_slices(args), **of_slices(kwargs))
        return _run(name, func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Refuses what does not ask `__torch_function__`."""
        raise NotImplementedError(f"{func} on a sequence that is divided over ranks")


def _hooked(tensor: Divided, hook: Callable[[Tensor], Any]) -> Any:
    """Calls ``hook`` with the gradient of the whole, divided alike, of which it may return another one."""
    division, copies = tensor.division, tensor.division.mesh.sp_size

    def hooked(gradient: Tensor) -> Any:
        # The loss of the whole is that of each rank, and a slice gets the gradients of all of them.
        answer = hook(Divided(gradient / copies, division))
        if answer is None:
            return None
        return (answer.local if isinstance(answer, Divided) else division.cut(answer, division.dim)) * copies

    return tensor.local.register_hook(hooked)


def _lost(gradient: Tensor) -> None:
    # No function gives one to the tensor that only stands for a sequence, except one that does not ask it.
    raise _own_function()


def _own_function() -> UlyssesError:
    return UlyssesError(
        "a torch.autograd.Function that was applied to a sequence which is divided over ranks",
        "the whole sequence, or functions of torch, whose gradients reach the slices",
        "apply it to lightning_ulysses.gather_sequence(x), or drop 'divided' from the plan",
    )


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers how functions of these names run on slices."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in Divided.rules, name
            Divided.rules[name] = function
        return function

    return register


def name_of(func: Any) -> str:
    """The name of a function, a method, or the attribute that it gets."""
    name: str = getattr(func, "__name__", "")
    if name == "__get__":
        return str(getattr(func.__self__, "__name__", ""))
    return name


def divided_in(*values: Any) -> Iterator[Divided]:
    """The divided tensors in nested values."""
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Divided))


def of_slices(values: Any) -> Any:
    """Nested values with the slice of each divided tensor in its place."""
    return tree_map(lambda leaf: leaf.local if isinstance(leaf, Divided) else leaf, values)


def joined(values: Any) -> Any:
    """Nested values with all of each divided tensor in its place; a collective if there is one."""
    return tree_map(lambda leaf: leaf.whole() if isinstance(leaf, Divided) else leaf, values)


def aware(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does not ask its arguments, which does what the function ``name`` of torch does."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if next(divided_in(args, kwargs), None) is None:
            return function(*args, **kwargs)
        return _run(name, function, args, kwargs)

    return run


def touched(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What a function of the shape of its argument returns of the slice, as the whole."""
    if not isinstance(tensor, Divided):
        return function(tensor)
    return Divided(function(tensor.local), tensor.division)


def changes_first(name: str) -> bool:
    """Whether a method of this name changes its tensor in place."""
    return (name.endswith("_") and not name.endswith("__")) or name in _INTO or name == "__setitem__"


def _has_lost_graph(tensor: Divided) -> bool:
    """Whether a function that does not ask made it from one with a graph: the graph is not that of the slice."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.requires_grad and not tensor.local.requires_grad


def _run(name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if any(map(_has_lost_graph, divided_in(args, kwargs))):
        raise _own_function()
    # Operators have the rules of functions; methods in place have their own.
    rule = Divided.rules.get(name) or Divided.rules.get(name.removeprefix("__").removesuffix("__"))
    answer = NotImplemented if rule is None else rule(func, args, kwargs)
    return _joined(func, name, args, kwargs) if answer is NotImplemented else answer


def _joined(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if name in ("backward", "__set__", "numpy", "data_ptr", "untyped_storage", "storage"):
        raise NotImplementedError(f"{name} of a sequence that is divided over ranks")
    whole_args, whole_kwargs = joined((args, kwargs))
    answer = func(*whole_args, **whole_kwargs)
    first = args[0] if args else None
    if isinstance(first, Divided) and changes_first(name):
        changed = whole_args[0]
        if changed.shape != first.shape:
            raise NotImplementedError(f"{name} that changes the shape of a sequence that is divided over ranks")
        # In place as well, so that views of the slice see it.
        first.local.copy_(first.division.cut(changed, first.division.dim))
        return None if answer is None else first
    return answer
