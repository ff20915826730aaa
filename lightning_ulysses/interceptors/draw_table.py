"""Which dimension of what a step draws carries the sequence.

The trial of a step runs it on a whole excerpt and on slices of it. The n-th draw of one run has the shape of the n-th
draw of the other, but for the dimension that is cut. The line that drew it keeps that dimension. Where no trial ran, it
is the dimension that is as long as a slice.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ulysses.context import LocalBatch, SequenceContext

# The name of the function that draws, how many dimensions it draws, and the line that called it.
Site = tuple[str, int, str, int]
Drawn = tuple[str, tuple[int, ...]]

_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), contextlib.__file__, "<")


@dataclass(frozen=True)
class Cut:
    """Where a tensor carries this rank's slice.

    Attributes:
        dim: The dimension.
        lead: Sequences that lie one after another in it: B where rows and tokens are one dimension, else 1.
        length: S without padding.
        begin: The first token of the slice.
        share: S_r.
    """

    dim: int
    lead: int
    length: int
    begin: int
    share: int

    @property
    def _filled(self) -> int:
        """Tokens of the slice that are no padding of this package."""
        return min(max(self.length - self.begin, 0), self.share)

    def whole(self, shape: Sequence[int]) -> list[int]:
        """The shape of what one process would draw."""
        return [self.lead * self.length if dim == self.dim else size for dim, size in enumerate(shape)]

    def take(self, whole: Tensor) -> Tensor:
        """This rank's slice; a copy, since a view would keep all of ``whole`` in memory."""
        # (..., k * S, ...) -> (..., k, S, ...) -> (..., k, S_r, ...) -> (..., k * S_r, ...)
        parts = whole.unflatten(self.dim, (self.lead, self.length))
        own = parts.narrow(self.dim + 1, min(self.begin, self.length), self._filled)
        own = self._padded(own, 0, self.share - self._filled, 0.0) if self._filled < self.share else own.clone()
        return own.flatten(self.dim, self.dim + 1)

    def put(self, own: Tensor, fill: float) -> Tensor:
        """A whole tensor that holds ``own`` in its place."""
        # (..., k * S_r, ...) -> (..., k, S_r, ...) -> (..., k, S, ...) -> (..., k * S, ...)
        parts = own.unflatten(self.dim, (self.lead, self.share)).narrow(self.dim + 1, 0, self._filled)
        before = min(self.begin, self.length)
        parts = self._padded(parts, before, self.length - before - self._filled, fill)
        return parts.flatten(self.dim, self.dim + 1)

    def _padded(self, parts: Tensor, before: int, after: int, fill: float) -> Tensor:
        behind = parts.dim() - self.dim - 2
        return F.pad(parts, [0, 0] * behind + [before, after], value=fill)


class DrawTable:
    """What is known of the lines that draw; one for a run."""

    def __init__(self) -> None:
        # None for a line that draws the same for all slices.
        self._dims: dict[Site, int | None] = {}
        # Lines that draw along different dimensions, and lines of which the user knows that they are ambiguous.
        self._unclear: set[Site] = set()
        self._warned: set[Site] = set()
        self._recorded: list[Drawn] | None = None
        self._expected: Iterator[Drawn] | None = None

    @contextmanager
    def recording(self, drawn: list[Drawn]) -> Iterator[None]:
        """Adds to ``drawn`` what the step inside draws on the whole excerpt."""
        before, self._recorded = self._recorded, drawn
        try:
            yield
        finally:
            self._recorded = before

    @contextmanager
    def replaying(self, drawn: Sequence[Drawn]) -> Iterator[None]:
        """Compares what the step inside draws with what it ``drawn`` on the whole excerpt."""
        before, self._expected = self._expected, iter(drawn)
        try:
            yield
        finally:
            self._expected = before

    def find(
        self, context: SequenceContext, name: str, shape: tuple[int, ...], dims: Sequence[int] | None = None
    ) -> Cut | None:
        """How a draw is cut; None if it is the same for all slices.

        Args:
            context: Where the step stands.
            name: Of the function that draws.
            shape: What it would draw.
            dims: Those that may carry the sequence; all by default.
        """
        place, batch = context.place, _cut_batch(context)
        if not shape or (batch is None and not place.takes_calls):
            return None
        site = _site(name, len(shape))
        if place.takes_calls:
            self._note(site, shape)
        if batch is None:
            return None
        share = batch.layout.shares[context.mesh.sp_rank]
        dim = self._dim(site, shape, share, batch.rows, range(len(shape)) if dims is None else dims)
        if dim is None:
            return None
        layout = batch.layout
        return Cut(dim, shape[dim] // share, layout.real_len, layout.starts[context.mesh.sp_rank], share)

    def _note(self, site: Site, shape: tuple[int, ...]) -> None:
        if self._recorded is not None:
            self._recorded.append((site[0], shape))
        if self._expected is None:
            return
        name, whole = next(self._expected, ("", ()))
        if name != site[0] or len(whole) != len(shape):
            # Some draw is missing in one of the runs: from here on, lengths decide.
            self._expected = None
            return
        cut = [dim for dim in range(len(shape)) if whole[dim] != shape[dim]]
        dim = cut[0] if len(cut) == 1 else None
        if self._dims.setdefault(site, dim) != dim:
            self._unclear.add(site)

    def _dim(self, site: Site, shape: tuple[int, ...], share: int, rows: int, dims: Sequence[int]) -> int | None:
        if site in self._dims and site not in self._unclear:
            dim = self._dims[site]
            if dim is None or (dim in dims and shape[dim] and shape[dim] % share == 0):
                return dim
        # (B, S_r, ...) before (B * S_r, ...), and both before others
        wanted = [(1, share), (0, rows * share), *((dim, share) for dim in dims)]
        if shape[0] != rows:
            wanted = wanted[1:]
        found = [dim for dim, length in wanted if dim in dims and shape[dim] == length]
        if len({*found}) > 1:
            self._warn(site, shape, share, found[0])
        return found[0] if found else None

    def _warn(self, site: Site, shape: tuple[int, ...], share: int, dim: int) -> None:
        if site in self._warned:
            return
        self._warned.add(site)
        warnings.warn(
            f"{site[0]} at {site[2]}:{site[3]} draws {shape}, of which several dimensions are as long as the {share} "
            f"tokens of a slice. Dimension {dim} is taken for the sequence. Set check_model=True in the strategy to "
            "find it by a trial, or draw another shape.",
            stacklevel=4,
        )


def _cut_batch(context: SequenceContext) -> LocalBatch | None:
    """The batch of which tensors are slices at this place of the step; None where they are whole."""
    place = context.place
    if context.mesh.sp_size == 1:
        return None
    if place.region is None and place.hidden is None and context.plan is not None and not context.is_joined:
        # Such a plan cuts the batch, whatever the model splits.
        return place.batch
    return place.region or place.hidden


def _site(name: str, dims: int) -> Site:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame = frame.f_back
    where = ("", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)
    return name, dims, *where
