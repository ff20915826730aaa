"""Exchange, attend, exchange: each rank computes attention over the whole sequence for its share of the heads.

With more ranks than heads, or as the user divides them, ranks that hold the same heads divide the queries, and gather
keys and values.

Source: DeepSpeed-Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ulysses.attention.call import Meaning
from lightning_ulysses.attention.kernel_report import note_gathered
from lightning_ulysses.context import LocalBatch
from lightning_ulysses.exchange.all_to_all import heads_to_seq, keys_to_heads, queries_to_heads, seq_to_heads
from lightning_ulysses.exchange.cut_and_join import join_shares
from lightning_ulysses.exchange.gathered_keys import GatheredKeys, gather_keys, return_queries, take_queries
from lightning_ulysses.exchange.mesh import HeadGrid, SequenceMesh
from lightning_ulysses.geometry.heads import HeadLayout, head_layout
from lightning_ulysses.geometry.query_runs import query_runs
from lightning_ulysses.geometry.shares import starts
from lightning_ulysses.sequence import share_error


@dataclass(frozen=True)
class Exchange:
    """The exchanges of one attention call.

    Attributes:
        heads: Which rank gets which heads.
        shares: S_r of every rank that exchanges heads with this one.
        mesh: Sizes and groups. Without a group nothing is exchanged: packed documents on one rank, whose slice is the
            whole sequence, and which has all heads.
        key_shares: The same of the keys, which may be of another sequence.
        grid: The ranks that exchange heads, and those that hold the same ones.
        keys: Over the ranks that hold the same heads; None if there is one.
    """

    heads: HeadLayout
    shares: tuple[int, ...]
    key_shares: tuple[int, ...]
    mesh: SequenceMesh
    grid: HeadGrid
    keys: GatheredKeys | None = None

    @classmethod
    def of(cls, batch: LocalBatch, q: Tensor, k: Tensor, meaning: Meaning, mesh: SequenceMesh) -> Exchange:
        """That of queries (B, H, S_r, D) and keys (B, H_kv, S_r, D).

        Raises:
            UlyssesError: If a length is not this rank's share.
        """
        rank, layout, key_layout = mesh.sp_rank, batch.layout, batch.key_layout
        for tensor, each, what in ((q, layout, "attention"), (k, key_layout, "attention with keys")):
            if tensor.shape[2] != each.shares[rank]:
                raise share_error(tensor.shape[2], each, rank, what)
        shares = layout.shares
        grid = mesh.grid(q.shape[1])
        size, heads = grid.ulysses, head_layout(q.shape[1], k.shape[1], grid.ulysses)
        if grid.keys_group is None:
            return cls(heads, shares, key_layout.shares, mesh, grid)
        if batch.keys is not None:
            return JoinedKeys(head_layout(q.shape[1], k.shape[1], 1), shares, key_layout.shares, mesh, grid)
        note_gathered(q.shape[1], size, grid.gather)
        runs = [shares[first : first + size] for first in range(0, mesh.sp_size, size)]
        queries = query_runs(tuple(map(sum, runs)), meaning.grows)
        own = runs[grid.outer]
        return cls(heads, own, own, mesh, grid, GatheredKeys(queries, grid.outer, grid.keys_group))

    @property
    def query_heads(self) -> slice:
        """The query heads of this rank among all H."""
        return slice(*self.heads.query_ranges[self.grid.inner])

    @property
    def kv_index(self) -> tuple[int, ...] | None:
        """For each query head of this rank its key/value head if groups are uneven, else None."""
        return None if self.grid.heads_group is None else self.heads.uneven_groups[self.grid.inner]

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each (B, heads, S_r, D) -> (B, heads of this rank, S, D), of queries those with which it attends."""
        if self.grid.heads_group is not None and self.key_shares != self.shares:
            where = self.grid.inner, self.grid.heads_group
            k, v = keys_to_heads(k, v, self.heads, self.key_shares, *where)
            q = queries_to_heads(q, self.heads, self.shares, *where)
        elif self.grid.heads_group is not None:
            q, k, v = seq_to_heads(q, k, v, self.heads, self.shares, self.grid.inner, self.grid.heads_group)
        return (q, k, v) if self.keys is None else gather_keys(q, k, v, self.keys)

    def output(self, out: Tensor) -> Tensor:
        """(B, H_r, S_q, D_v) -> (B, H, S_r, D_v)."""
        if self.keys is not None:
            out = return_queries(out, self.keys)
        if self.grid.heads_group is None:
            return out
        return heads_to_seq(out, self.heads, self.shares, self.grid.inner, self.grid.heads_group)

    def adjoint(self, out: Tensor) -> Tensor:
        """The opposite of `output`: (B, H, S_r, D_v) -> (B, H_r, S_q, D_v)."""
        if self.grid.heads_group is not None:
            out = queries_to_heads(out, self.heads, self.shares, self.grid.inner, self.grid.heads_group)
        return out if self.keys is None else take_queries(out, self.keys)

    def attend(self, meaning: Meaning, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The computation on what `inputs` returned: (B, H_r, S_q, D_v)."""
        return attend_runs(meaning, q, k, v, self.query_heads, self.kv_index, self.mesh, self.keys)


@dataclass(frozen=True)
class JoinedKeys(Exchange):
    """Attention to another sequence where ranks divide queries: each attends with its own to all keys."""

    @property
    def query_heads(self) -> slice:
        """All of them."""
        return slice(0, self.heads.num_heads)

    @property
    def kv_index(self) -> tuple[int, ...] | None:
        """See `Exchange`."""
        return None

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q (B, H, S_r, D) as it is, k and v (B, H_kv, S_r, D) -> (B, H_kv, S, D)."""
        rank, group = self.mesh.sp_rank, self.mesh.sp_group
        assert group is not None
        k, v = (join_shares(tensor, 2, self.key_shares, rank, group) for tensor in (k, v))
        return q, k, v

    def output(self, out: Tensor) -> Tensor:
        """As it is."""
        return out

    def adjoint(self, out: Tensor) -> Tensor:
        """As it is."""
        return out

    def attend(self, meaning: Meaning, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, S_r, D_v)."""
        first = starts(self.shares)[self.mesh.sp_rank]
        return meaning.attend(q, k, v, self.query_heads, None, self.mesh, first)


def attend_runs(
    meaning: Meaning,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: slice,
    kv_index: tuple[int, ...] | None,
    mesh: SequenceMesh,
    keys: GatheredKeys | None,
) -> Tensor:
    """`Meaning.attend` for each run of queries of this rank.

    Args:
        meaning: The computation.
        q: (B, H_r, S_q, D).
        k: (B, heads needed, S, D).
        v: (B, heads needed, S, D_v).
        heads: See `Meaning.attend`.
        kv_index: See `Meaning.attend`.
        mesh: Sizes and ranks.
        keys: Over whom keys were gathered; None if queries are those of the whole sequence.

    Returns:
        (B, H_r, S_q, D_v).
    """
    if keys is None:
        return meaning.attend(q, k, v, heads, kv_index, mesh, 0)
    runs = keys.queries.of(keys.rank)
    # One split, whose backward is one concatenation.
    parts = q.split([end - begin for begin, end in runs], dim=2)
    outputs = [
        meaning.attend(part, k, v, heads, kv_index, mesh, begin) for part, (begin, _) in zip(parts, runs, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


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
        UlyssesError: If a length is not this rank's share.
    """
    exchange = Exchange.of(batch, q, k, meaning, mesh)
    q, k, v = exchange.inputs(q, k, v)
    return exchange.output(exchange.attend(meaning, q, k, v))
