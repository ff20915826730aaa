"""Joins the slices that ``predict_step`` returns into whole sequences.

Slices are recognized by their shape: the sequence dimension has the length of this rank's slice. Everything else is
returned as it is. Ranks also compare their tensors. A floating-point tensor that is equal on all ranks is whole
already. A warning names tensors for which the shape may have decided wrongly.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from lightning_ulysses.context import LocalBatch
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.agreement import fingerprint
from lightning_ulysses.exchange.gather import join_sequence
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.regions.notes import split_layout

# Number of elements that are compared at first: tensors that differ usually differ in these.
_SAMPLE = 2**16


class _Entry(NamedTuple):
    """A rank's description of one entry of its output, for the other ranks. ``shape`` is None if it is no tensor."""

    name: str
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    fingerprint: int = 0

    @property
    def kind(self) -> tuple[str, str, int | None]:
        """The part that must be the same on every rank."""
        return self.name, self.dtype, None if self.shape is None else len(self.shape)

    def __str__(self) -> str:
        where = f"output{self.name}"
        return f"{where}, no tensor" if self.shape is None else f"{where} {self.shape} {self.dtype}"


def _names(output: Any, count: int) -> list[str]:
    """The path of each entry in ``output``, such as ``['logits'][0]``."""
    try:
        return [keystr(path) for path, _ in tree_flatten_with_path(output)[0]]
    except ValueError:
        # Some container class was registered in torch without names for its entries.
        return [f" (entry {index})" for index in range(count)]


def _is_plain(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf.is_nested and not leaf.is_quantized


def _sample(tensor: Tensor) -> Tensor:
    """At most about `_SAMPLE` elements from the beginning of ``tensor``."""
    for dim in range(tensor.dim()):
        if tensor.numel() > _SAMPLE:
            tensor = tensor.narrow(dim, 0, max(1, tensor.shape[dim] * _SAMPLE // tensor.numel()))
    return tensor


def _describe(name: str, leaf: Any, layout: SequenceLayout, rows: int) -> _Entry:
    if not _is_plain(leaf):
        return _Entry(name)
    shape = tuple(leaf.shape)
    # A tensor that may be joined is compared in full after the join, and only if the samples are equal.
    # Any rank's share counts, since all ranks must take the same sample.
    joins = any(_sequence_dim([shape], (share,), rows) is not None for share in layout.shares)
    number = fingerprint([_sample(leaf) if joins else leaf])
    return _Entry(name, shape, str(leaf.dtype).removeprefix("torch."), number)


def _check_entries(everyone: list[list[_Entry]]) -> None:
    """Raises `UlyssesError` unless all ranks return the same entries with the same dtype and number of dimensions."""
    kinds = [{entry.kind for entry in entries} for entries in everyone]
    if all([entry.kind for entry in entries] == [entry.kind for entry in everyone[0]] for entries in everyone):
        return
    # The error shows only the entries that some rank lacks.
    shared = set.intersection(*kinds)
    own = [[str(entry) for entry in entries if entry.kind not in shared] for entries in everyone]
    seen = (
        f"rank {rank}: {', '.join(names[:4]) + ', ...' * (len(names) > 4) if names else 'nothing else'}"
        for rank, names in enumerate(own)
    )
    raise UlyssesError(
        f"outputs of predict_step that differ between the ranks of a sequence: {'; '.join(seen)}",
        "the same entries in the same order on every rank, and tensors of the same dtype and number of dimensions",
        "return the same entries whatever the slice holds",
    )


def _sequence_dim(shapes: list[tuple[int, ...]], shares: tuple[int, ...], rows: int) -> int | None:
    """1 for (B, S_r, ...), 0 for (S_r, ...) if B = 1, else None. Decided by the shapes on all ranks."""
    # Dimension 1 first: it is the usual one.
    for dim in (1, 0):
        fits = shapes[0][0] == rows if dim and shapes[0] else rows == 1
        if not fits or dim >= len(shapes[0]):
            continue
        # All other dimensions must agree between the ranks.
        others = {(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}
        if len(others) == 1 and all(shape[dim] == share for shape, share in zip(shapes, shares, strict=True)):
            return dim
    return None


def _is_whole(leaf: Tensor, joined: Tensor, shares: tuple[int, ...], dim: int) -> bool:
    """Whether all ranks hold the same whole tensor.

    Equal integers, or one number repeated for all tokens, prove nothing: different slices may hold the same values.
    """
    if not (leaf.is_floating_point() or leaf.is_complex()):
        return False
    # One value for all tokens of a slice, such as its mean.
    if torch.equal(leaf, leaf.narrow(dim, 0, 1).expand_as(leaf)):
        return False
    return len({fingerprint([part]) for part in joined.split(shares, dim)}) == 1


def join_outputs(output: Any, local: LocalBatch, mesh: SequenceMesh) -> Any:
    """Joins every slice in a nested output, (B, S_r, ...) -> (B, S, ...), on every rank of the group.

    If B = 1, also (S_r, ...) -> (S, ...). Everything else is returned as it is. So is a floating-point tensor that is
    equal on all ranks and not constant along the sequence: it is whole already.

    Args:
        output: The return value of ``predict_step``.
        local: The batch that it was computed on.
        mesh: Sizes and groups.

    Raises:
        UlyssesError: On every rank, if ranks return different entries.
    """
    if mesh.sp_group is None:
        return output
    layout = split_layout(local)
    # Any nesting of tuples, lists and dicts; the result has the same one.
    leaves, spec = tree_flatten(output)
    named = zip(_names(output, len(leaves)), leaves, strict=True)
    mine = [_describe(name, leaf, layout, local.rows) for name, leaf in named]
    # One exchange of descriptions decides everything, so all ranks call the same collectives below.
    everyone: list[Any] = [None] * mesh.sp_size
    dist.all_gather_object(everyone, mine, mesh.sp_group)
    _check_entries(everyone)
    differing, equal = [], []
    for index, entries in enumerate(zip(*everyone, strict=True)):
        if entries[0].shape is None:
            continue
        # Shape, dtype and fingerprint are equal on all ranks.
        is_same = len({entry[1:] for entry in entries}) == 1
        dim = _sequence_dim([entry.shape for entry in entries], layout.shares, local.rows)
        if dim is None:
            differing += [str(entries[0])] * (not is_same)
            continue
        joined = join_sequence(leaves[index], layout.shares, dim, mesh.sp_group)
        if is_same and _is_whole(leaves[index], joined, layout.shares, dim):
            continue
        leaves[index] = joined.narrow(dim, 0, layout.real_len)
        equal += [str(entries[0])] * is_same
    # The lists are the same on all ranks.
    if mesh.sp_rank == 0:
        _warn(differing, equal, layout.shares[0])
    return tree_unflatten(leaves, spec)


def _warn(differing: list[str], equal: list[str], share: int) -> None:
    if differing:
        warnings.warn(
            f"{', '.join(differing)} of predict_step differs between the ranks of a sequence and is no (B, S_r, ...). "
            "Each rank returns that of its own slice. For that of the whole sequence, move the sequence to dimension 1 "
            "or compute it from lightning_ulysses.gather_sequence(x, dim).",
            stacklevel=3,
        )
    if equal:
        warnings.warn(
            f"{', '.join(equal)} of predict_step is the same on every rank of a sequence and is taken for slices of "
            f"{share} tokens, by its shape. If it is whole already, return it with a dimension in front, x[None], or "
            "as a list.",
            stacklevel=3,
        )
