"""Cross entropies of deferred logits, tile by tile, with any gradient from above."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_ulysses.memory.deferred_logits import DeferredLogits, Source, signature_of
from lightning_ulysses.memory.head import Head
from lightning_ulysses.memory.tiles import Conditions, GradientSums, Unwritten, aliased, as_call, spans


class _Work:
    """The losses of rows: those without a target are never computed."""

    def __init__(self, func: Callable[..., Tensor], logits: DeferredLogits, target: Tensor, options: Any) -> None:
        self.head: Head = logits.source.head
        self.parameters = self.head.parameters()
        self.ndim = max(logits.source.hidden.dim(), 2)
        self.target = target
        # (n,), the rows that have a target
        self.kept = (target != options["ignore_index"]).nonzero().squeeze(-1)
        # Logits in float32 are the largest tensors of a tile.
        self.size = self.head.config.rows(4 * logits.shape[-1])
        self._func = func
        self._options = options
        read = [tensor for tensor in (target, options["weight"]) if tensor is not None]
        self.unwritten = Unwritten(read, "the backward of a cross entropy", "give the cross entropy a copy of it")
        self._logits = logits.source.recipe()
        self._conditions = Conditions.now(self.head.module, target.device.type)

    def __call__(self, rows: Tensor) -> Tensor:
        """Inside of the head's call: (N, D) -> (N,)."""
        losses: Tensor = _Losses.apply(self, rows, *self.parameters)
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
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        work: _Work = ctx.work
        (rows,) = ctx.saved_tensors
        work.unwritten.check()
        needs_rows = ctx.needs_input_grad[1]
        of_rows = torch.zeros_like(rows) if needs_rows else None
        sums = GradientSums(work.parameters)
        for numbers in work.tiles() if len(work.kept) else []:
            tile = rows[numbers].detach().requires_grad_(needs_rows)
            with aliased(work.head.module, work.parameters) as own_parameters, torch.enable_grad():
                losses = work.losses(tile, numbers)
            wanted = [tile, *own_parameters] if needs_rows else own_parameters
            found = list(torch.autograd.grad(losses, wanted, gradient[numbers], allow_unused=True))
            if of_rows is not None and (own := found.pop(0)) is not None:
                of_rows[numbers] = own
            sums.add(found)
        return None, of_rows, *sums.result(fills=True)


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
    work = _Work(func, logits, target, options)
    with torch.set_grad_enabled(torch.is_grad_enabled() and logits.requires_grad):
        losses: Tensor = work.head.run(work, logits.hidden)
    if reduction == "none":
        return losses
    # In half precision neither the sum nor the count would be exact.
    total = losses.float().sum() if losses.dtype.itemsize < 4 else losses.sum()
    if reduction == "mean":
        kept = target[work.kept]
        total = total / (len(kept) if weight is None else weight[kept].sum().to(total.dtype))
    return total.to(losses.dtype)


def defer(head: Head, hidden: Tensor, width: int, dtype: torch.dtype) -> DeferredLogits:
    """Stands for the logits (..., V) of hidden states (..., D)."""
    source = Source(head, hidden, (), dtype, hidden.requires_grad or bool(head.parameters()))
    return DeferredLogits(source, hidden, (*hidden.shape[:-1], width))


def touch(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What a function that changes nothing returns of a tensor, by way of the hidden states where it is deferred."""
    return tensor.touched(function) if isinstance(tensor, DeferredLogits) else function(tensor)


DeferredLogits.cross_entropy = staticmethod(cross_entropy)
