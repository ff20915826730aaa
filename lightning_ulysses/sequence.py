"""The public functions that ask where in a sequence this process stands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_ulysses.context import LiveBatch, SequenceState, current_state, eager_while_live
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.gather import join_sequence
from lightning_ulysses.geometry.layout import SequenceLayout


def _cut_batch(state: SequenceState | None, length: int) -> LiveBatch | None:
    """The batch that a tensor over ``length`` tokens can be a slice of; None where nothing is cut."""
    if state is None or state.sharded_batch is not None or not state.is_planned or state.is_joined:
        return state.sharded_batch if state is not None else None
    # Before the model is split, what the plan leaves to be cut is cut, and what it keeps whole is whole.
    running = state.running
    return None if running is None or length == running.layout.seq_len else running


@contextmanager
def unsharded() -> Iterator[None]:
    """Plain attention inside a step: for a forward on tensors that are whole on every rank.

    Example:
        >>> with lightning_ulysses.unsharded():
        ...     sample = self.model(prompt)
    """
    state = current_state()
    if state is None:
        yield
        return
    with state.suspended():
        yield


def check_share(length: int, layout: SequenceLayout, rank: int, what: str) -> None:
    """Raises `UlyssesError` unless ``length`` is this rank's share of the live batch."""
    share = layout.shares[rank]
    if length != share:
        raise UlyssesError(
            f"{what} over {length} tokens while this rank holds {share} of the batch's {layout.seq_len}",
            f"a length of {share}",
            "run a forward on other data inside `with lightning_ulysses.unsharded():`; with a plan, name a submodule "
            "whose keys are whole on every rank, such as those of a text, under `local`",
        )


@eager_while_live
def sequence_positions(x: Tensor, dim: int = 1) -> Tensor:
    """Positions of this rank's tokens in the whole sequence, in place of ``torch.arange(x.shape[dim])``.

    Args:
        x: Any tensor that carries the sequence, (B, S_r) or (B, S_r, ...).
        dim: The dimension of ``x`` that carries the sequence.

    Returns:
        (S_r,) int64 on the device of ``x``; 0 ... S-1 when nothing is sharded.

    Raises:
        UlyssesError: If a batch is live and ``x`` does not have this rank's share of it along ``dim``.
    """
    length, offset = x.shape[dim], 0
    state = current_state()
    batch = _cut_batch(state, length)
    if state is not None and batch is not None:
        layout, rank = batch.layout, state.mesh.sp_rank
        check_share(length, layout, rank, f"sequence_positions(x, dim={dim})")
        offset = layout.start(rank)
    return torch.arange(offset, offset + length, device=x.device)


@eager_while_live
def gather_sequence(x: Tensor, dim: int = 1) -> Tensor:
    """The whole sequence from this rank's slice: (B, S_r, ...) -> (B, S, ...), the same on every rank of the group.

    Every rank of the sequence-parallel group has to call it. Gradients do not flow through it. ``x`` comes back as it
    is when nothing is sharded.

    Raises:
        UlyssesError: If ``x`` does not have this rank's share of the live batch along ``dim``.
    """
    state = current_state()
    batch = _cut_batch(state, x.shape[dim])
    if state is None or batch is None or state.mesh.sp_group is None:
        return x
    layout = batch.layout
    check_share(x.shape[dim], layout, state.mesh.sp_rank, f"gather_sequence(x, dim={dim})")
    whole = join_sequence(x, layout.shares, dim, state.mesh.sp_group)
    return whole.narrow(dim, 0, layout.seq_len - layout.num_padding)
