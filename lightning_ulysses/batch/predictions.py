"""Joins what ``predict_step`` returns into whole sequences.

Shapes alone do not tell a slice from a whole tensor that happens to be as long, so the ranks of a group compare what
they hold: slices of one sequence differ, a whole tensor is the same everywhere.
"""

from __future__ import annotations

import hashlib
import warnings
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from lightning_ulysses.context import LiveBatch
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.gather import join_sequence
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.layout import SequenceLayout

# Entries that are enough to see that two ranks hold different tensors.
_SAMPLE = 2**16
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Entry(NamedTuple):
    """What a rank tells the others of one entry of its output; ``shape`` is None for what is no tensor."""

    name: str
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    digest: bytes = b""

    @property
    def kind(self) -> tuple[str, str, int | None]:
        """What has to be the same on every rank."""
        return self.name, self.dtype, None if self.shape is None else len(self.shape)

    def __str__(self) -> str:
        where = f"output{self.name}"
        return f"{where}, no tensor" if self.shape is None else f"{where} {self.shape} {self.dtype}"


def _names(output: Any, count: int) -> list[str]:
    """Where each entry is found in ``output``, such as ``['logits'][0]``."""
    try:
        return [keystr(path) for path, _ in tree_flatten_with_path(output)[0]]
    except ValueError:
        # A container that was registered without names for its entries.
        return [f" (entry {index})" for index in range(count)]


def _is_plain(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf.is_nested and not leaf.is_quantized


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, so that NaN equals itself."""
    if tensor.is_complex():
        # (...) -> (..., 2)
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.resolve_neg().view(_BITS[tensor.element_size()])


def _digest(tensor: Tensor, limit: int) -> bytes:
    """A hash of at most ``limit`` entries at the beginning of ``tensor``."""
    for dim in range(tensor.dim()):
        if tensor.numel() > limit:
            tensor = tensor.narrow(dim, 0, max(1, tensor.shape[dim] * limit // tensor.numel()))
    # (...) -> (bytes,)
    flat = _bits(tensor.detach()).cpu().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).digest()


def _carries(shape: tuple[int, ...], share: int, rows: int) -> bool:
    """Whether some dimension is as long as a slice, or the first as its tokens of all rows together."""
    return share in shape or shape[:1] == (rows * share,)


def _describe(name: str, leaf: Any, layout: SequenceLayout, rows: int) -> _Entry:
    if not _is_plain(leaf):
        return _Entry(name)
    shape = tuple(leaf.shape)
    joins = any(_sequence_dim([shape], (share,), rows) is not None for share in layout.shares)
    carries = any(_carries(shape, share, rows) for share in layout.shares)
    # What is joined is compared whole in `_join`; what could be refused for its place is compared whole here.
    digest = _digest(leaf, leaf.numel() if carries and not joins else _SAMPLE)
    return _Entry(name, shape, str(leaf.dtype).removeprefix("torch."), digest)


def _check_entries(everyone: list[list[_Entry]]) -> None:
    """Raises `UlyssesError` unless all ranks return the same entries, tensors of one dtype and as many dimensions."""
    kinds = [{entry.kind for entry in entries} for entries in everyone]
    if all([entry.kind for entry in entries] == [entry.kind for entry in everyone[0]] for entries in everyone):
        return
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
    """1 for (B, S_r, ...), 0 for (S_r, ...) where B = 1, by the shapes on all ranks; None for anything else."""
    for dim in (1, 0):
        fits = shapes[0][0] == rows if dim and shapes[0] else rows == 1
        if not fits or dim >= len(shapes[0]):
            continue
        others = {(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}
        if len(others) == 1 and all(shape[dim] == share for shape, share in zip(shapes, shares, strict=True)):
            return dim
    return None


def _join(leaf: Tensor, entries: list[_Entry], dim: int, layout: SequenceLayout, mesh: SequenceMesh) -> Tensor:
    """The whole sequence from what is one by its shapes, or ``leaf`` itself if it turns out to be whole."""
    assert mesh.sp_group is not None
    whole = join_sequence(leaf, layout.shares, dim, mesh.sp_group)
    bits = [_bits(part) for part in whole.split(layout.shares, dim)]
    if len({entry.digest for entry in entries}) == 1 and all(torch.equal(bits[0], other) for other in bits[1:]):
        varies = not torch.equal(bits[0], bits[0].narrow(dim, 0, 1).expand_as(bits[0]))
        if varies and (leaf.is_floating_point() or leaf.is_complex()):
            return leaf
        _warn(
            f"{entries[0]} of predict_step is the same on every rank of a sequence and is taken for slices of "
            f"{layout.shares[0]} tokens, since its dimension {dim} is as long. If it is whole already, return it with "
            "a dimension in front, x[None], or as a list.",
            mesh,
        )
    return whole.narrow(dim, 0, layout.seq_len - layout.num_padding)


def _check_rest(entries: list[_Entry], layout: SequenceLayout, rows: int, mesh: SequenceMesh) -> None:
    """What is no sequence by its shapes is left alone, but not silently if it differs between ranks."""
    shapes = [entry.shape or () for entry in entries]
    if len({(entry.shape, entry.digest) for entry in entries}) == 1:
        return
    if all(_carries(shape, share, rows) for shape, share in zip(shapes, layout.shares, strict=True)):
        raise UlyssesError(
            f"output{entries[0].name} of predict_step of shapes {shapes} on the ranks of a sequence, which differs "
            f"between them and has their S_r = {layout.shares} tokens elsewhere than in (B, S_r, ...) with B = {rows}",
            "(B, S_r, ...), or (S_r, ...) where B = 1, or a tensor that is the same on every rank to the last bit",
            "move the sequence to dimension 1, or return lightning_ulysses.gather_sequence(x, dim) with the dimension "
            "that carries it",
        )
    _warn(
        f"output{entries[0].name} of predict_step, of shapes {shapes} on the ranks of a sequence, differs between them "
        "and carries no sequence, so each rank returns that of its own slice. For that of the whole sequence, compute "
        "it from lightning_ulysses.gather_sequence(x, dim).",
        mesh,
    )


def _warn(message: str, mesh: SequenceMesh) -> None:
    if mesh.sp_rank == 0:
        warnings.warn(message, stacklevel=2)


def join_outputs(output: Any, live: LiveBatch, mesh: SequenceMesh) -> Any:
    """Every sequence of a nested output joined, (B, S_r, ...) -> (B, S, ...), on every rank of the group.

    Where B = 1, (S_r, ...) -> (S, ...) as well. A floating-point tensor that is the same on every rank, and not the
    same for every token, is whole and comes back as it is; so does everything that has no dimension of S_r.

    Args:
        output: What ``predict_step`` returned.
        live: The batch that it was computed on.
        mesh: Sizes and groups.

    Raises:
        UlyssesError: On every rank, if ranks return different entries, or a sequence in another dimension.
    """
    if mesh.sp_group is None:
        return output
    layout, rows = live.split_layout, live.rows
    leaves, spec = tree_flatten(output)
    named = zip(_names(output, len(leaves)), leaves, strict=True)
    everyone: list[Any] = [None] * mesh.sp_size
    dist.all_gather_object(everyone, [_describe(name, leaf, layout, rows) for name, leaf in named], mesh.sp_group)
    _check_entries(everyone)
    for index, entries in enumerate(zip(*everyone, strict=True)):
        if entries[0].shape is None:
            continue
        dim = _sequence_dim([entry.shape for entry in entries], layout.shares, rows)
        if dim is None:
            _check_rest(list(entries), layout, rows, mesh)
        else:
            leaves[index] = _join(leaves[index], list(entries), dim, layout, mesh)
    return tree_unflatten(leaves, spec)
