"""Exchange, attend, exchange: each rank computes attention over the whole sequence for its share of the heads.

Source: DeepSpeed-Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_ulysses.attention.call import Meaning
from lightning_ulysses.context import LocalBatch
from lightning_ulysses.exchange.all_to_all import heads_to_seq, queries_to_heads, seq_to_heads
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.heads import HeadLayout, head_layout
from lightning_ulysses.sequence import share_error


@dataclass(frozen=True)
class Exchange:
    """The exchanges of one attention call.

    Attributes:
        heads: Which rank gets which heads.
        shares: S_r of every rank.
        mesh: Sizes and groups. Without a group nothing is exchanged: packed documents on one rank, whose slice is the
            whole sequence, and which has all heads.
    """

    heads: HeadLayout
    shares: tuple[int, ...]
    mesh: SequenceMesh

    @classmethod
    def of(cls, batch: LocalBatch, q: Tensor, k: Tensor, mesh: SequenceMesh) -> Exchange:
        """That of queries (B, H, S_r, D) and keys (B, H_kv, S_r, D).

        Raises:
            UlyssesError: If a length is not this rank's share, or P > H.
        """
        rank, shares = mesh.sp_rank, batch.layout.shares
        for tensor, what in ((q, "attention"), (k, "attention with keys")):
            if tensor.shape[2] != shares[rank]:
                raise share_error(tensor.shape[2], batch.layout, rank, what)
        if q.shape[1] < mesh.sp_size:
            mesh.check_heads(q.shape[1])
        return cls(head_layout(q.shape[1], k.shape[1], mesh.sp_size), shares, mesh)

    @property
    def query_heads(self) -> slice:
        """The query heads of this rank among all H."""
        return slice(*self.heads.query_ranges[self.mesh.sp_rank])

    @property
    def kv_index(self) -> tuple[int, ...] | None:
        """For each query head of this rank its key/value head if groups are uneven, else None."""
        return None if self.mesh.sp_group is None else self.heads.uneven_groups[self.mesh.sp_rank]

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each (B, heads, S_r, D) -> (B, heads of this rank, S, D)."""
        if self.mesh.sp_group is None:
            return q, k, v
        return seq_to_heads(q, k, v, self.heads, self.shares, self.mesh.sp_rank, self.mesh.sp_group)

    def output(self, out: Tensor) -> Tensor:
        """(B, H_r, S, D_v) -> (B, H, S_r, D_v)."""
        if self.mesh.sp_group is None:
            return out
        return heads_to_seq(out, self.heads, self.shares, self.mesh.sp_rank, self.mesh.sp_group)

    def adjoint(self, out: Tensor) -> Tensor:
        """The opposite of `output`: (B, H, S_r, D_v) -> (B, H_r, S, D_v)."""
        if self.mesh.sp_group is None:
            return out
        return queries_to_heads(out, self.heads, self.shares, self.mesh.sp_rank, self.mesh.sp_group)


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
    exchange = Exchange.of(batch, q, k, mesh)
    q, k, v = exchange.inputs(q, k, v)
    return exchange.output(meaning.attend(q, k, v, exchange.query_heads, exchange.kv_index, mesh))
