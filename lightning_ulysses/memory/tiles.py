"""Tiles of the rows of a tensor, and the state in which a backward computes them again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.notes import version


def spans(rows: int, size: int) -> list[tuple[int, int]]:
    """Begin and end of each tile of ``size`` rows; the last one may be shorter."""
    return [(begin, min(begin + size, rows)) for begin in range(0, rows, size)]


def rows_of(x: Tensor) -> int:
    """The number of vectors along the last dimension."""
    return x.numel() // max(x.shape[-1], 1)


def as_call(rows: Tensor, ndim: int) -> Tensor:
    """Rows (n, D) with as many dimensions as the module gets otherwise, (1, ..., n, D)."""
    return rows.view(*[1] * (ndim - 2), *rows.shape) if ndim > 1 else rows


@dataclass(frozen=True)
class Conditions:
    """The mixed precision and the modes of a forward, which autograd does not restore for a backward.

    Attributes:
        device: Type of the device.
        enabled: Whether mixed precision is on.
        dtype: Of what is cast.
        modes: Whether each module below the one that runs trains.
    """

    device: str
    enabled: bool
    dtype: torch.dtype
    modes: tuple[tuple[nn.Module, bool], ...]

    @classmethod
    def now(cls, module: nn.Module, device: str) -> Conditions:
        """Those at this moment."""
        modes = tuple((inner, inner.training) for inner in module.modules())
        return cls(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), modes)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Restores them. Nothing is cached: weights that are cast without gradients would be used with them later."""
        changed = [(module, mode) for module, mode in self.modes if module.training != mode]
        for module, mode in changed:
            module.training = mode
        try:
            with torch.autocast(self.device, self.dtype, self.enabled, cache_enabled=False):
                yield
        finally:
            for module, mode in changed:
                module.training = not mode


class Unwritten:
    """Tensors that are read again later, and must hold then what they hold now.

    Args:
        tensors: Any.
        what: What is computed of them, for messages.
        fix: What to do instead of writing to them.
    """

    def __init__(self, tensors: Sequence[Tensor], what: str, fix: str) -> None:
        self._known = [(tensor, version(tensor)) for tensor in tensors]
        self._what = what
        self._fix = fix

    def check(self) -> None:
        """Raises `UlyssesError` if one was written to."""
        written = [tensor for tensor, known in self._known if version(tensor) != known]
        if written:
            raise UlyssesError(
                f"a tensor {tuple(written[0].shape)} that was written to before {self._what}",
                "the values that it had in the forward",
                self._fix,
            )


@contextmanager
def aliased(module: nn.Module, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Puts other tensors with the same memory in the place of parameters below ``module``.

    Gradients of a tile are taken of these, so that no hook of a parameter sees them; it sees their sum.

    Yields:
        One for each parameter, in their order.
    """
    others: dict[int, Tensor] = {id(each): nn.Parameter(each.detach()) for each in parameters}
    held = [
        (inner._parameters, name, value)
        for inner in module.modules()
        for name, value in dict.items(inner._parameters)
        if id(value) in others
    ]
    try:
        for owner, name, value in held:
            owner[name] = others[id(value)]  # type: ignore[assignment]
        yield [others[id(each)] for each in parameters]
    finally:
        for owner, name, value in held:
            owner[name] = value


class GradientSums:
    """Sums of the gradients of all tiles, in float32 at least: sums in bfloat16 lose what later tiles add.

    Args:
        parameters: Those that need gradients.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._sums: list[Tensor | None] = [None] * len(parameters)

    def add_to(self, index: int, gradient: Tensor) -> None:
        """Adds a gradient of one parameter, which nobody else holds."""
        total = self._sums[index]
        self._sums[index] = gradient if total is None else total.add_(gradient)

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Adds what one tile gives, in the order of the parameters."""
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            total = self._sums[index]
            if total is None:
                # A copy: autograd may hand out one tensor twice.
                self._sums[index] = gradient.to(precise(gradient.dtype), copy=True)
            else:
                total.add_(gradient)

    def unrounded(self) -> list[Tensor]:
        """The sums, zeros for a parameter that no tile used."""
        return [
            torch.zeros_like(parameter, dtype=precise(parameter.dtype)) if total is None else total
            for total, parameter in zip(self._sums, self._parameters, strict=True)
        ]

    def result(self, fills: bool = False) -> list[Tensor | None]:
        """The sums, each in the type of its parameter.

        Args:
            fills: Whether a parameter that no tile used gets zeros in place of no gradient.
        """
        return [
            total.to(parameter.dtype) if total is not None else torch.zeros_like(parameter) if fills else None
            for total, parameter in zip(self._sums, self._parameters, strict=True)
        ]


def precise(dtype: torch.dtype) -> torch.dtype:
    """The type in which values of a type are summed."""
    return torch.float32 if dtype.itemsize < 4 else dtype
