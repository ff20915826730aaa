"""The keys that each query sees as two numbers per token, and as blocks for ``flex_attention``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_ulysses.attention.rows import Row

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Blocks are as long as the kernel's, or longer: so many of them at most, since a table of blocks by blocks is built.
_BLOCK = 128
_MOST_BLOCKS = 2048


def _in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (R, 1, n) and indices (R, 1, n, n) of the blocks of keys for each block of queries."""
    indices = blocks.byte().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), indices.int()


@dataclass(frozen=True)
class VisibleKeys:
    """What each query sees: the keys of a run, without those that a padding mask drops.

    Args:
        begins: (R, S) int32, the first key of each query; R is B, or 1 if all rows are alike.
        ends: (R, S) int32, the key behind the last one.
        kept: (R, S) bool, False for keys that no query sees.
        num_rows: B.
    """

    begins: Tensor
    ends: Tensor
    kept: Tensor
    num_rows: int

    @property
    def size(self) -> int:
        """Tokens of a block."""
        size = _BLOCK
        while size * _MOST_BLOCKS < self.begins.shape[1]:
            size *= 2
        return size

    @cached_property
    def blocks(self) -> tuple[Tensor, Tensor]:
        """(R, 1, n, n) bool: the blocks of which some pair is seen but not all, and those of which all are."""
        size, length = self.size, self.begins.shape[1]
        number = -(-length // size)
        padding = number * size - length

        def by_block(tensor: Tensor, fill: int) -> Tensor:
            # (R, S) -> (R, n * size) -> (R, n, size)
            return torch.nn.functional.pad(tensor.int(), (0, padding), value=fill).unflatten(1, (number, size))

        # What is behind the end sees nothing and is not seen, so that no block with it is whole.
        begins, ends = by_block(self.begins, length), by_block(self.ends, 0)
        kept = by_block(self.kept, 0)
        first = torch.arange(number, device=begins.device) * size
        # (R, n, 1) of queries against (n,) of keys -> (R, n, n)
        seen = begins.where(begins < ends, length)
        some = (seen.amin(2)[..., None] < first + size) & (ends.amax(2)[..., None] > first) & kept.any(2)[:, None]
        whole = (begins.amax(2)[..., None] <= first) & (ends.amin(2)[..., None] >= first + size) & kept.all(2)[:, None]
        return (some & ~whole).unsqueeze(1), whole.unsqueeze(1)

    @cached_property
    def mask(self) -> BlockMask:
        """A mask for ``flex_attention``."""
        from torch.nn.attention.flex_attention import BlockMask

        # (R, S) -> (B, S)
        begins, ends, kept = (
            tensor.expand(self.num_rows, -1).contiguous() for tensor in (self.begins, self.ends, self.kept)
        )

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key >= begins[row, query]) & (key < ends[row, query]) & kept[row, key]

        some, whole = (_in_order(blocks) for blocks in self.blocks)
        length = begins.shape[1]
        return BlockMask.from_kv_blocks(
            *some, *whole, BLOCK_SIZE=self.size, mask_mod=sees, seq_lengths=(length, length)
        )


def visible_keys(
    rows: list[Row], num_rows: int, length: int, causal: bool, reach: tuple[int, int] | None, device: torch.device
) -> VisibleKeys:
    """What the queries of each row see.

    Args:
        rows: Documents and kept keys of each row, or of the first row if all are equal.
        num_rows: B.
        length: S.
        causal: Query i sees keys up to i.
        reach: How many keys before its own and how many after it a query sees.
        device: Of the result.
    """
    place = torch.arange(length, dtype=torch.int32)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for documents, valid in rows:
        lengths = torch.tensor([end - begin for begin, end in documents])
        # (documents,) -> (S,)
        begins, ends = (
            torch.tensor(side, dtype=torch.int32).repeat_interleave(lengths) for side in zip(*documents, strict=True)
        )
        if causal:
            ends = torch.minimum(ends, place + 1)
        if reach is not None:
            begins, ends = torch.maximum(begins, place - reach[0]), torch.minimum(ends, place + reach[1] + 1)
        kept = torch.full((length,), valid is None)
        for begin, end in valid or ():
            kept[begin:end] = True
        found.append((begins, ends, kept))
    # R times (S,) -> (R, S)
    begins, ends, kept = (torch.stack(side).to(device) for side in zip(*found, strict=True))
    return VisibleKeys(begins, ends, kept, num_rows)
