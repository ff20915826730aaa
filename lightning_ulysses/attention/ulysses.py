"""Exchange, attend, exchange: each rank computes attention over the whole sequence for its share of the heads.

Source: DeepSpeed-Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

from torch import Tensor

from lightning_ulysses.attention.call import Meaning
from lightning_ulysses.context import LocalBatch
from lightning_ulysses.exchange.all_to_all import heads_to_seq, seq_to_heads
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.heads import head_layout
from lightning_ulysses.sequence import share_error


def check_shares(batch: LocalBatch, q: Tensor, k: Tensor, mesh: SequenceMesh) -> None:
    """Refuses tensors that are no slices of the sequence, and P > H.

    Raises:
        UlyssesError: If a length is not this rank's share, or P > H.
    """
    rank, shares = mesh.sp_rank, batch.layout.shares
    for tensor, what in ((q, "attention"), (k, "attention with keys")):
        if tensor.shape[2] != shares[rank]:
            raise share_error(tensor.shape[2], batch.layout, rank, what)
    if mesh.sp_group is not None and q.shape[1] < mesh.sp_size:
        mesh.check_heads(q.shape[1])


def exchanged(batch: LocalBatch, q: Tensor, k: Tensor, v: Tensor, meaning: Meaning, mesh: SequenceMesh) -> Tensor:
    """Computes an attention call over the whole sequence of a batch.

    Args:
        batch: The batch that is split.
        q: (B, H, S_r, D).
        k: (B, H_kv, S_r, D).
        v: (B, H_kv, S_r, D_v).
        meaning: The computation.
        mesh: Sizes and groups. Without a group nothing is exchanged.

    Returns:
        (B, H, S_r, D_v).

    Raises:
        UlyssesError: If a length is not this rank's share, or P > H.
    """
    check_shares(batch, q, k, mesh)
    rank, shares = mesh.sp_rank, batch.layout.shares
    if mesh.sp_group is None:
        # Packed documents on one rank: its slice is the whole sequence, and it has all heads.
        return meaning.attend(q, k, v, slice(0, q.shape[1]), None, mesh)
    heads = head_layout(q.shape[1], k.shape[1], mesh.sp_size)
    q, k, v = seq_to_heads(q, k, v, heads, shares, rank, mesh.sp_group)
    out = meaning.attend(q, k, v, slice(*heads.query_ranges[rank]), heads.uneven_groups[rank], mesh)
    return heads_to_seq(out, heads, shares, rank, mesh.sp_group)
