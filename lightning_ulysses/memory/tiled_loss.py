"""Cross entropies of deferred logits, tile by tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_ulysses.memory.deferred_logits import DeferredLogits, Source, signature_of
from lightning_ulysses.memory.exact_sums import ExactSums
from lightning_ulysses.memory.head import Head
from lightning_ulysses.memory.tiles import Conditions, GradientSums, Unwritten, aliased, as_call, precise, spans


def with_target(target: Tensor, ignore_index: int) -> Tensor:
    """The numbers (n,) of the rows that have a target."""
    return (target != ignore_index).nonzero().squeeze(-1)


class _Work:
    """The losses of rows: those without a target are never computed.

    Args:
        func: The function, ``torch.nn.functional.cross_entropy``.
        logits: (N, V)
        target: (N,)
        options: Of the function, without the reduction.
        sums: Whether the sum of all losses is wanted, and its gradients.
    """

    def __init__(
        self, func: Callable[..., Tensor], logits: DeferredLogits, target: Tensor, options: Any, sums: bool
    ) -> None:
        self.head: Head = logits.source.head
        self.parameters = self.head.parameters()
        self.ndim = max(logits.source.hidden.dim(), 2)
        self.target = target
        # (n,), the rows that have a target
        self.kept = with_target(target, options["ignore_index"])
        # Logits in float32 are the largest tensors of a tile.
        self.size = self.head.config.rows(4 * logits.shape[-1])
        #: Of the losses.
        self.dtype = logits.dtype
        self._sums = sums
        self._func = func
        self._options = options
        read = [tensor for tensor in (target, options["weight"]) if tensor is not None]
        self.unwritten = Unwritten(read, "the backward of a cross entropy", "give the cross entropy a copy of it")
        self._logits = logits.source.recipe()
        self._conditions = Conditions.now(self.head.module, target.device.type)

    def __call__(self, rows: Tensor) -> Tensor:
        """Inside of the head's call: (N, D) -> (N,), or their sum (1,)."""
        function = _Total if self._sums else _Losses
        losses: Tensor = function.apply(self, rows, *self.parameters)
        return losses

    def tiles(self) -> list[Tensor]:
        """The numbers of the rows of each tile; one empty tile where no row has a target."""
        count = len(self.kept)
        return [self.kept[begin:end] for begin, end in spans(count, self.size)] or [self.kept]

    def losses(self, tile: Tensor, numbers: Tensor) -> Tensor:
        """The losses of a tile, (n, D) -> (n,)."""
        logits = self._logits(self.head.logits, as_call(tile, self.ndim)).flatten(0, -2)
        with self._conditions.again():
            return self._func(logits, self.target[numbers], **self._options, reduction="none")


class _Losses(torch.autograd.Function):
    """The loss of each row. The backward repeats the logits of a tile, so any gradient from above is right."""

    @staticmethod
    def forward(ctx: Any, work: _Work, rows: Tensor, *parameters: Tensor) -> Tensor:
        ctx.work = work
        ctx.save_for_backward(rows)
        losses: Tensor | None = None
        for numbers in work.tiles():
            part = work.losses(rows[numbers], numbers)
            if losses is None:
                losses = part.new_zeros(len(rows))
            losses[numbers] = part
        assert losses is not None
        work.dtype = losses.dtype
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        work: _Work = ctx.work
        (rows,) = ctx.saved_tensors
        work.unwritten.check()
        pass_ = _Pass(work, rows, ctx.needs_input_grad[1])
        for numbers in work.tiles() if len(work.kept) else []:
            pass_.tile(numbers, gradient)
        return None, pass_.of_rows, *pass_.sums.result(fills=True)


class _Total(torch.autograd.Function):
    """The sum of the losses of all rows. A tile gives its gradients at once, which the backward only scales."""

    @staticmethod
    def forward(ctx: Any, work: _Work, rows: Tensor, *parameters: Tensor) -> Tensor:
        pass_, total = _Pass(work, rows, ctx.needs_input_grad[1]), rows.new_zeros(1, dtype=precise(rows.dtype))
        # Hooks around the step, such as a checkpoint's, see what is kept for the backward and no tile.
        with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _same):
            for numbers in work.tiles():
                losses = pass_.tile(numbers, None) if len(numbers) else work.losses(rows[numbers], numbers)
                total = total + losses.to(precise(losses.dtype)).sum()
                work.dtype = losses.dtype
        ctx.dtypes = [each.dtype for each in parameters]
        ctx.save_for_backward(pass_.of_rows, *pass_.sums.unrounded())
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        of_rows, *sums = ctx.saved_tensors
        scaled = [
            torch.mul(total, gradient, out=total.new_empty(total.shape, dtype=dtype))
            for total, dtype in zip(sums, ctx.dtypes, strict=True)
        ]
        return None, None if of_rows is None else of_rows * gradient.to(of_rows.dtype), *scaled


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _Pass:
    """The gradients of rows and parameters, tile by tile."""

    def __init__(self, work: _Work, rows: Tensor, needs_rows: bool) -> None:
        self.of_rows = torch.zeros_like(rows) if needs_rows else None
        self.sums = GradientSums(work.parameters)
        self._work = work
        self._rows = rows

    def tile(self, numbers: Tensor, gradient: Tensor | None) -> Tensor:
        """Adds what one tile gives.

        Args:
            numbers: The rows of the tile.
            gradient: (N,), of the losses of all rows; None where it is one for each.

        Returns:
            The losses of the tile.
        """
        work, needs_rows = self._work, self.of_rows is not None
        tile = self._rows[numbers].detach().requires_grad_(needs_rows)
        with aliased(work.head.module, work.parameters) as own, torch.enable_grad(), ExactSums(self.sums, own):
            losses = work.losses(tile, numbers)
        above = torch.ones_like(losses) if gradient is None else gradient[numbers]
        found = list(torch.autograd.grad(losses, [tile, *own] if needs_rows else own, above, allow_unused=True))
        if self.of_rows is not None and (part := found.pop(0)) is not None:
            self.of_rows[numbers] = part
        self.sums.add(found)
        return losses.detach()


def cross_entropy(func: Callable[..., Tensor], logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    """``torch.nn.functional.cross_entropy`` of deferred logits.

    Args:
        func: The function.
        logits: (N, V)
        *args: As ``func`` takes them.
        **kwargs: Likewise.

    Returns:
        The loss; NotImplemented where only all logits will do.
    """
    given = signature_of(func).bind(logits, *args, **kwargs)
    given.apply_defaults()
    options = dict(given.arguments)
    target, reduction = options.pop("target"), options.pop("reduction")
    del options["input"]
    is_old = options.pop("size_average") is not None or options.pop("reduce") is not None
    is_index = isinstance(target, Tensor) and not target.is_floating_point() and target.dim() == 1
    if is_old or not is_index or logits.dim() != 2 or len(target) != len(logits) or len(target) == 0:
        return NotImplemented
    weight = options["weight"]
    if reduction not in ("none", "sum", "mean") or (weight is not None and weight.requires_grad):
        return NotImplemented
    has_graph = torch.is_grad_enabled() and logits.requires_grad
    work = _Work(func, logits, target, options, has_graph and reduction != "none" and not _is_narrow(logits.hidden))
    with torch.set_grad_enabled(has_graph):
        losses: Tensor = work.head.run(work, logits.hidden)
    if reduction == "none":
        return losses
    # In half precision neither the sum nor the count would be exact.
    total = losses.to(precise(losses.dtype)).sum()
    if reduction == "mean":
        kept = target[work.kept]
        total = total / (len(kept) if weight is None else weight[kept].sum().to(total.dtype))
    return total.to(work.dtype)


def _is_narrow(hidden: Tensor) -> bool:
    """Whether gradients are computed in float16, which cannot hold small ones before the loss is scaled up."""
    kind = hidden.device.type
    is_cast = torch.is_autocast_enabled(kind)
    return torch.float16 in (hidden.dtype, torch.get_autocast_dtype(kind) if is_cast else hidden.dtype)


def defer(head: Head, hidden: Tensor, width: int, dtype: torch.dtype) -> DeferredLogits:
    """Stands for the logits (..., V) of hidden states (..., D)."""
    source = Source(head, hidden, (), dtype, hidden.requires_grad or bool(head.parameters()))
    return DeferredLogits(source, hidden, (*hidden.shape[:-1], width))


def touch(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What a function that changes nothing returns of a tensor, by way of the hidden states where it is deferred."""
    return tensor.touched(function) if isinstance(tensor, DeferredLogits) else function(tensor)


DeferredLogits.cross_entropy = staticmethod(cross_entropy)
