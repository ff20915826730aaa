"""Public functions that depend on the slice of this rank: positions, gather, and running unsharded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_ulysses.context import LocalBatch, SequenceContext, current_context, eager_while_live
from lightning_ulysses.divided import Divided
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.gather import join_sequence
from lightning_ulysses.geometry.layout import SequenceLayout


def _cut_batch(context: SequenceContext | None, length: int) -> LocalBatch | None:
    """The batch that a tensor with ``length`` tokens is a slice of; None if nothing is cut."""
    if context is None:
        return None
    split = context.split
    if split is not None or context.plan is None or context.awaits_region is not None:
        return split
    # Here a plan without join has not split the model yet: its `whole` inputs are whole, other tensors are slices.
    running = context.place.batch
    return None if running is None or length == running.layout.seq_len else running


@contextmanager
def unsharded() -> Iterator[None]:
    """Makes attention plain inside a step, for a forward on tensors that are whole on every rank.

    Example:
        >>> with lightning_ulysses.unsharded():
        ...     sample = self.model(prompt)
    """
    context = current_context()
    if context is None:
        yield
        return
    with context.suspended():
        yield


def share_error(length: int, layout: SequenceLayout, rank: int, what: str) -> UlyssesError:
    """The error for a ``length`` that is not this rank's share of the batch that is split."""
    share = layout.shares[rank]
    return UlyssesError(
        f"{what} over {length} tokens while this rank holds {share} of the batch's {layout.seq_len}",
        f"a length of {share}",
        "run a forward on other data inside `with lightning_ulysses.unsharded():`; with a plan, name a submodule "
        "whose keys are whole on every rank, such as those of a text, under `local`",
    )


def check_share(length: int, layout: SequenceLayout, rank: int, what: str) -> None:
    """Raises `UlyssesError` unless ``length`` is this rank's share of the batch that is split."""
    if length != layout.shares[rank]:
        raise share_error(length, layout, rank, what)


@eager_while_live
def sequence_positions(x: Tensor, dim: int = 1) -> Tensor:
    """Positions of this rank's tokens in the whole sequence, in place of ``torch.arange(x.shape[dim])``.

    Args:
        x: Any tensor that carries the sequence, (B, S_r) or (B, S_r, ...).
        dim: The dimension of ``x`` that carries the sequence.

    Returns:
        (S_r,) int64 on the device of ``x``. 0 ... S-1 if nothing is split.

    Raises:
        UlyssesError: If a batch is split and the length of ``x`` along ``dim`` is not this rank's share.
    """
    length, offset = x.shape[dim], 0
    context = current_context()
    batch = _cut_batch(context, length)
    if context is not None and batch is not None:
        layout, rank = batch.layout, context.mesh.sp_rank
        check_share(length, layout, rank, f"sequence_positions(x, dim={dim})")
        offset = layout.starts[rank]
    return torch.arange(offset, offset + length, device=x.device)


@eager_while_live
def gather_sequence(x: Tensor, dim: int = 1) -> Tensor:
    """The whole sequence from this rank's slice: (B, S_r, ...) -> (B, S, ...), the same on every rank of the group.

    Every rank of the sequence-parallel group must call it. Gradients do not flow through it, except where a plan has
    left ``x`` divided. If nothing is split, ``x`` is returned as it is.

    Raises:
        UlyssesError: If a batch is split and the length of ``x`` along ``dim`` is not this rank's share.
    """
    if isinstance(x, Divided):
        return x.whole()
    context = current_context()
    batch = _cut_batch(context, x.shape[dim])
    if context is None or batch is None or context.mesh.sp_group is None:
        return x
    layout = batch.layout
    check_share(x.shape[dim], layout, context.mesh.sp_rank, f"gather_sequence(x, dim={dim})")
    whole = join_sequence(x, layout.shares, dim, context.mesh.sp_group)
    # Drops the padding that this package added.
    return whole.narrow(dim, 0, layout.real_len)
