"""Joins what ``predict_step`` returns into whole sequences."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.layout import SequenceLayout
from lightning_ulysses.mesh import SequenceMesh
from lightning_ulysses.sequence import join_sequence


def _sequence_dim(tensor: Tensor, share: int) -> int | None:
    """1 for (B, S_r, ...), 0 for (S_r,); anything else carries no sequence."""
    if tensor.dim() > 1 and tensor.shape[1] == share:
        return 1
    return 0 if tensor.dim() == 1 and tensor.shape[0] == share else None


def join_outputs(output: Any, layout: SequenceLayout, mesh: SequenceMesh) -> Any:
    """Every tensor (B, S_r, ...) or (S_r,) of a nested output as (B, S, ...) or (S,), on every rank of the group.

    Raises:
        UlyssesError: On every rank, if ranks disagree on which tensors carry the sequence.
    """
    if mesh.sp_group is None:
        return output
    leaves, spec = tree_flatten(output)
    dims = [_sequence_dim(leaf, layout.shares[mesh.sp_rank]) if isinstance(leaf, Tensor) else None for leaf in leaves]
    everyone: list[Any] = [None] * mesh.sp_size
    dist.all_gather_object(everyone, dims, group=mesh.sp_group)
    if any(other != dims for other in everyone):
        shapes = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]
        raise UlyssesError(
            f"outputs of predict_step of shapes {shapes} of which it is unclear which carry the sequence",
            f"(B, S_r, ...) with S_r of {layout.shares} on the ranks for those that do",
            "return the sequence in dimension 1, and no other tensor whose dimension 1 happens to be as long",
        )
    real = layout.seq_len - layout.num_padding
    joined = [
        leaf if dim is None else join_sequence(leaf, layout.shares, dim, mesh.sp_group).narrow(dim, 0, real)
        for leaf, dim in zip(leaves, dims, strict=True)
    ]
    return tree_unflatten(joined, spec)
