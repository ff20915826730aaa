"""A per-token submodule that runs tile by tile along the tokens, and keeps nothing but its input for the backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_ulysses.config import MemoryConfig
from lightning_ulysses.context import SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.memory.exact_sums import ExactSums
from lightning_ulysses.memory.replaced import Replaced
from lightning_ulysses.memory.tiles import Conditions, GradientSums, aliased, as_call, rows_of, spans
from lightning_ulysses.memory.trying import check_ready, try_rows
from lightning_ulysses.notes import is_plain
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.patching.outside_graphs import eager


class _Work:
    """One call of a module: how to compute a tile, and the gradient of its output on the way through the backward."""

    def __init__(self, module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, size: int) -> None:
        self.module = module
        self.ndim = x.dim()
        self.tiles = spans(rows_of(x), size)
        self.parameters: list[Tensor] = [each for each in module.parameters() if each.requires_grad]
        self.gradient: Tensor | None = None
        self._call = call
        self._conditions = Conditions.now(module, x.device.type)

    def __call__(self, rows: Tensor) -> Tensor:
        # (n, D) -> (n, D_out)
        with self._conditions.again():
            return self._call(as_call(rows, self.ndim)).flatten(0, -2)


class _Anchor(torch.autograd.Function):
    """Keeps the input before any tile runs.

    A checkpoint around it stops its recomputation when it has everything that was kept, so that tiles run twice in a
    step and not three times. It gives the gradients of input and parameters.
    """

    @staticmethod
    def forward(ctx: Any, work: _Work, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.work = work
        ctx.save_for_backward(x)
        return x.new_zeros(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> Any:
        work: _Work = ctx.work
        (x,) = ctx.saved_tensors
        gradient, work.gradient = work.gradient, None
        assert gradient is not None
        # (..., S, D) -> (N, D)
        rows, upstream = x.detach().flatten(0, -2), gradient.flatten(0, -2)
        needs_x = ctx.needs_input_grad[1]
        of_rows = torch.zeros_like(rows) if needs_x else None
        sums = GradientSums(work.parameters)
        for begin, end in work.tiles:
            tile = rows[begin:end].detach().requires_grad_(needs_x)
            with (
                aliased(work.module, work.parameters) as own,
                torch.enable_grad(),
                ExactSums(sums, own),
            ):
                output = work(tile)
            wanted = [tile, *own] if needs_x else own
            found = list(torch.autograd.grad(output, wanted, upstream[begin:end], allow_unused=True))
            if of_rows is not None and (part := found.pop(0)) is not None:
                of_rows[begin:end] = part
            sums.add(found)
        return None, None if of_rows is None else of_rows.view_as(x), *sums.result()


class _Tiles(torch.autograd.Function):
    """Computes all tiles, and hands the gradient of the output to the anchor."""

    @staticmethod
    def forward(ctx: Any, work: _Work, token: Tensor, x: Tensor) -> Tensor:
        ctx.work = work
        return _run(work, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.work.gradient = gradient
        return None, gradient.new_zeros(1), None


def _run(work: _Work, x: Tensor) -> Tensor:
    # (..., S, D) -> (N, D)
    rows = x.flatten(0, -2)
    output: Tensor | None = None
    for begin, end in work.tiles:
        part = work(rows[begin:end])
        if output is None:
            output = part.new_empty(len(rows), part.shape[-1])
        output[begin:end] = part
    assert output is not None
    # (N, D_out) -> (..., S, D_out)
    return output.view(*x.shape[:-1], output.shape[-1])


def run_tiles(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """What ``call`` gives for each row of ``x``, tile by tile.

    Args:
        module: Holds all parameters that need gradients. Each gets its gradient once.
        call: Computes (1, ..., n, D) -> (1, ..., n, D_out), each row by itself and without random numbers.
        x: (..., S, D), at least one row.
        size: Rows of a tile.

    Returns:
        (..., S, D_out)
    """
    work = _Work(module, call, x, size)
    if not torch.is_grad_enabled() or not (x.requires_grad or work.parameters):
        with torch.no_grad():
            return _run(work, x)
    token = _Anchor.apply(work, x, *work.parameters)
    output: Tensor = _Tiles.apply(work, token, x.detach())
    return output


def _with(plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor) -> Any:
    return plain(rows, *args, **kwargs)


class TiledModule:
    """The forward of one module, tile by tile.

    Args:
        context: Tells whether the step is being tried; then the module runs as it was written.
        part: The setting, such as ``"tiled_mlp"``, for messages.
        name: Of the module.
        module: The module.
        config: Sizes of tiles.
        lenient: Whether a module that does not suit runs as it was written, and is not refused.
    """

    def __init__(
        self,
        context: SequenceContext,
        part: str,
        name: str,
        module: nn.Module,
        config: MemoryConfig,
        lenient: bool = False,
    ) -> None:
        self._context = context
        self._part = part
        self._name = name
        self._module = module
        self._config = config
        self._lenient = lenient
        self._plain: Callable[..., Any] = module.forward
        # Bytes that a row keeps, by whether the module trains: a batch norm is per token in evaluation alone.
        self._row_bytes: dict[tuple[bool, torch.dtype], int] = {}

    def install(self) -> Handle:
        """Replaces the forward."""
        handle = Handle()
        replaced = Replaced(self._module, "forward", eager(self._forward))
        self._plain = replaced.original
        replaced.put(handle)
        return handle

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else None
        # A subclass stands for something else, such as a sequence that is divided over ranks.
        has_rows = isinstance(x, Tensor) and is_plain(x) and x.dim() > 1 and x.numel() > 0
        if not has_rows or self._context.place.takes_calls:
            return self._plain(*args, **kwargs)
        assert isinstance(x, Tensor)
        # Without the tokens: the graph holds it, and a checkpoint around the module must be able to let them go.
        call = partial(_with, self._plain, args[1:], kwargs)
        try:
            self._check_arguments(args[1:], kwargs)
            check_ready(self._part, self._name, self._module)
            size = self._size(call, x)
        except UlyssesError:
            if not self._lenient:
                raise
            return self._plain(*args, **kwargs)
        if rows_of(x) <= size:
            return self._plain(*args, **kwargs)
        return run_tiles(self._module, call, x, size)

    def _check_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        others = [value for value in (*args, *kwargs.values()) if isinstance(value, (Tensor, tuple, list, dict))]
        if others:
            raise UlyssesError(
                f"{self._part} for {self._name!r} ({type(self._module).__name__}), which is called with "
                f"{1 + len(others)} tensors",
                "a submodule whose only tensor is that of the tokens",
                f"leave {self._name!r} out: give {self._part} the names of the submodules that are called with one",
            )

    def _size(self, call: Callable[[Tensor], Any], x: Tensor) -> int:
        key = (self._module.training, x.dtype)
        if key not in self._row_bytes:
            with self._context.plain():
                self._row_bytes[key] = try_rows(self._part, self._name, self._module, call, x)
        return self._config.rows(self._row_bytes[key])
