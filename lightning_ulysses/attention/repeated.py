"""Attention that keeps what its kernels returned, and not what it was computed from.

For its gradients the computation is repeated on the same inputs, and each kernel answers with what it returned at
first: the backward of the kernel runs, and its forward does not run again. This holds for every kernel that torch sees
as an operator. Others, and computations without any kernel, run again. What is not a kernel, such as copies of heads,
is repeated in any case.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.upstream.torch_graph import leaves_of

Compute = Callable[..., Tensor]


@functools.lru_cache(maxsize=1024)
def _is_kernel(operator: Any) -> bool:
    """Whether an operator computes attention, by its name: torch's own, its ``varlen_attn`` and flash-attn's."""
    name = operator.name()
    is_forward = ("attention" in name or "attn" in name) and "backward" not in name and "bwd" not in name
    # What an operator writes into its arguments would be missing when it answers.
    return is_forward and not operator._schema.is_mutable


def _shapes(args: Any, kwargs: Any) -> list[torch.Size]:
    return [leaf.shape for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class _KernelCall:
    """One call of a kernel.

    Attributes:
        operator: The kernel.
        shapes: Of its inputs.
        leaves: What it returned.
        form: The structure of it.
    """

    operator: Any
    shapes: list[torch.Size]
    leaves: list[Any]
    form: TreeSpec


class _Record(TorchDispatchMode):
    """Takes note of what kernels return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_KernelCall] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        if _is_kernel(func):
            leaves, form = tree_flatten(answer)
            # The answer itself becomes part of the graph, which would live as long as it.
            leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            self.calls.append(_KernelCall(func, _shapes(args, kwargs), leaves, form))
        return answer


class _Answers(TorchDispatchMode):
    """Has kernels return what they returned at first, in the same order."""

    def __init__(self, calls: list[_KernelCall]) -> None:
        super().__init__()
        self._calls = calls[::-1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_kernel(func):
            return func(*args, **(kwargs or {}))
        if not self._calls or (self._calls[-1].operator, self._calls[-1].shapes) != (func, _shapes(args, kwargs)):
            raise RuntimeError(f"attention ran {func} in its backward, which its forward did not run at this place")
        call = self._calls.pop()
        leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in call.leaves]
        return tree_unflatten(leaves, call.form)


@dataclass(frozen=True)
class _View:
    """A tensor in the memory of another one."""

    size: torch.Size
    stride: tuple[int, ...]

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset())


@dataclass(frozen=True)
class _Index:
    """The place of a tensor among those that are kept."""

    number: int


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a piece of memory, in any order of dimensions."""
    order = sorted(range(tensor.dim()), key=lambda dim: (tensor.stride(dim), tensor.shape[dim]), reverse=True)
    return tensor.permute(order).is_contiguous()


def _is_same_memory(tensor: Tensor, out: Tensor) -> bool:
    """Whether a tensor holds all elements of ``out`` in the same memory, and nothing else."""
    if tensor.untyped_storage()._cdata != out.untyped_storage()._cdata or tensor.dtype != out.dtype:
        return False
    same = tensor.storage_offset() == out.storage_offset() and tensor.numel() == out.numel()
    return same and _is_dense(tensor) and _is_dense(out)


def _like(tensor: Tensor, size: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """``tensor`` in the memory layout of a dense one; a copy unless it has it."""
    wanted = [(n, step) for n, step in zip(size, stride, strict=True) if n > 1]
    if wanted == [(n, step) for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]:
        return tensor
    return torch.empty_strided(size, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


@contextmanager
def _nothing_saved() -> Iterator[None]:
    # With gradients: without them, some kernels return no log-sum-exp, and others are chosen.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):
        yield


class _Surroundings:
    """The settings of autocast and the random state in which a computation began."""

    def __init__(self, device: torch.device) -> None:
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in {"cpu", device.type}
            if torch.amp.is_autocast_available(kind)
        ]
        # That of the CPU, from which attention seeds its dropout on every device.
        self._random: Tensor | None = torch.get_rng_state()

    def forget_unused(self) -> None:
        """Drops the random state if nothing was drawn since."""
        if self._random is not None and torch.equal(self._random, torch.get_rng_state()):
            self._random = None

    @contextmanager
    def same_precision(self) -> Iterator[None]:
        """Autocast as it was."""
        with ExitStack() as stack:
            for kind, dtype, is_enabled in self._autocast:
                # Without its cache, which would hold what each leaf in float32 was cast to.
                stack.enter_context(torch.autocast(kind, dtype, is_enabled, cache_enabled=False))
            yield

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Autocast and random numbers as they were."""
        with self.same_precision(), torch.random.fork_rng(devices=[], enabled=self._random is not None):
            if self._random is not None:
                torch.set_rng_state(self._random)
            yield


@dataclass(frozen=True)
class Trace:
    """How to repeat a computation; see `run`.

    Attributes:
        surroundings: In which it began.
        calls: Of its kernels, with stand-ins for tensors. None if these run again.
        num_kept: How many tensors `run` has kept.
        out_size: Of the result.
        out_stride: Of the result.
    """

    surroundings: _Surroundings
    calls: list[_KernelCall] | None
    num_kept: int
    out_size: torch.Size
    out_stride: tuple[int, ...]

    def repeat(self, compute: Compute, inputs: Sequence[Tensor], out: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """Computes the result again, with the graph of its gradients.

        Args:
            compute: The same computation.
            inputs: Equal inputs, with or without a graph of their own.
            out: An equal result, in any memory layout.
            kept: What `run` kept.
        """
        with self.surroundings.restored(), torch.enable_grad(), ExitStack() as stack:
            if self.calls is not None:
                same = _like(out, self.out_size, self.out_stride)
                stack.enter_context(_Answers([_filled(call, same, kept) for call in self.calls]))
            return compute(*inputs)


def _filled(call: _KernelCall, out: Tensor, kept: Sequence[Tensor]) -> _KernelCall:
    leaves = [
        leaf.of(out) if isinstance(leaf, _View) else kept[leaf.number] if isinstance(leaf, _Index) else leaf
        for leaf in call.leaves
    ]
    return _KernelCall(call.operator, call.shapes, leaves, call.form)


def _learns(out: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether a gradient of ``out`` reaches leaves other than the inputs."""
    return any(all(leaf is not tensor for tensor in inputs) for leaf in leaves_of(out))


def run(compute: Compute, inputs: Sequence[Tensor], *, is_hidden: bool = False) -> tuple[Tensor, Trace, list[Tensor]]:
    """Computes attention without keeping its inputs.

    Args:
        compute: Returns one tensor, from the inputs.
        inputs: Detached tensors.
        is_hidden: Whether it is a user's function, that may be compiled. Its kernels run again.

    Returns:
        The result, detached; how to repeat it; and the tensors to keep for that. A kernel's result that is in the same
        memory as ``out`` is not among them.

    Raises:
        UlyssesError: If a user's function learns something, whose gradient would be lost.
    """
    surroundings = _Surroundings(inputs[0].device)
    record = _Record()
    with surroundings.same_precision(), _nothing_saved(), ExitStack() as stack:
        if not is_hidden:
            stack.enter_context(record)
        result = compute(*(tensor.requires_grad_() for tensor in inputs))
    if is_hidden and _learns(result, inputs):
        raise UlyssesError(
            "head_chunks with an attention function that uses parameters, such as a score_mod with a learned bias",
            "a function of queries, keys and values alone, since a chunk's backward computes it anew",
            "set head_chunks=1",
        )
    out = result.detach()
    del result
    surroundings.forget_unused()
    kept: list[Tensor] = []
    calls = []
    for call in record.calls:
        leaves: list[Any] = []
        for leaf in call.leaves:
            if not isinstance(leaf, Tensor):
                leaves.append(leaf)
            elif _is_same_memory(leaf, out):
                leaves.append(_View(leaf.shape, leaf.stride()))
            else:
                leaves.append(_Index(len(kept)))
                kept.append(leaf)
        calls.append(_KernelCall(call.operator, call.shapes, leaves, call.form))
    return out, Trace(surroundings, None if is_hidden else calls, len(kept), out.shape, out.stride()), kept
