"""A few tokens of a batch, as a batch of the same type."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_ulysses.batch.whole import WholeBatch, read_batch
from lightning_ulysses.geometry.batch_keys import KEPT, MASK_KEYS, BatchRules
from lightning_ulysses.geometry.shares import even_shares, starts

_EDGES = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")
# Tokens of an excerpt: enough to tell candidates apart, and few enough to cost nothing.
_TOKENS, _TOKENS_PER_RANK = 48, 12
_PLACES = 9
# Chunks of this many tokens and more are cut by a slice that is as long, where its length is a prime number.
_CHUNK = 11


def excerpt(batch: Any, rules: BatchRules, begin: int, count: int) -> Any:
    """The tokens from ``begin`` to ``begin + count`` of every row.

    Args:
        batch: A whole batch.
        rules: How to read it.
        begin: The first token.
        count: How many of them.
    """
    dims = read_batch(batch, rules, 1).dims

    def cut(key: str, value: Any) -> Any:
        if key in _EDGES and isinstance(value, Tensor):
            # Boundaries before or after the excerpt fall together, and each must be there only once.
            return (value - begin).clamp(0, count).unique()
        dim = dims.get(key)
        return value if dim is None or key not in given else value.narrow(dim, begin, count).contiguous()

    if isinstance(batch, Tensor):
        given = {"batch"}
        return cut("batch", batch)
    if hasattr(batch, "items"):
        given = set(batch)
        return {key: cut(key, value) for key, value in batch.items()}
    given = {str(index) for index in range(len(batch))}
    values = [cut(str(index), value) for index, value in enumerate(batch)]
    return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)


def excerpts(batch: WholeBatch, rules: BatchRules, sp_size: int, sizes: Collection[int]) -> Iterator[Any]:
    """Excerpts of several lengths from several places; the batch itself where it is short.

    Args:
        batch: The batch.
        rules: How to read it.
        sp_size: P.
        sizes: Lengths to avoid.
    """
    seq_len = batch.layout.real_len
    longest = min(seq_len, max(_TOKENS, _TOKENS_PER_RANK * sp_size))
    for count in (longest, longest // 2, longest // 3, 4 * sp_size):
        count = _length(count, seq_len, sp_size, sizes)
        if 2 * sp_size <= count < seq_len:
            for place in range(_PLACES):
                yield excerpt(batch.template, rules, (seq_len - count) * place // (_PLACES - 1), count)
        else:
            yield batch.template


def _length(count: int, seq_len: int, sp_size: int, sizes: Collection[int]) -> int:
    """The largest good length of an excerpt up to ``count``."""
    usual = [n for n in range(count, 2 * sp_size - 1, -1) if n == seq_len or n not in sizes]
    return next((n for n in usual if _cuts_chunks(n, sp_size)), usual[0] if usual else count)


def _cuts_chunks(count: int, sp_size: int) -> bool:
    """Whether slices cut through chunks of any usual length, in which a layer may mix tokens."""
    common = gcd(*starts(even_shares(count, sp_size))[1:])
    return common == 1 or (common >= _CHUNK and all(common % n for n in range(2, common)))


def most_filled(batches: Iterable[Any], rules: BatchRules, sp_size: int) -> Any:
    """The first batch in which every row has a target in every slice, else the one with most such pairs.

    Rows and slices without a target would hide which of them a loss depends on.
    """
    best, most = None, -1.0
    for batch in batches:
        filled = _filled(read_batch(batch, rules, sp_size), rules.ignore_index)
        if filled == 1.0:
            return batch
        if filled > most:
            best, most = batch, filled
    return best


def _filled(short: WholeBatch, ignore_index: int) -> float:
    """The part of pairs of a row and a slice that have a target, over all tensors that may hold them."""
    parts = []
    for name in short.counts:
        key = name.removesuffix(KEPT)
        if key not in short.tensors or short.dims.get(key) != 1 or short.tensors[key].dim() != 2:
            continue
        is_mask = key != name or key in MASK_KEYS
        kept = short.tensors[key] > 0 if is_mask else short.tensors[key] != ignore_index
        # (B, S) -> for each slice (B,)
        parts += [part.any(dim=1) for part in kept.split(short.layout.shares, dim=1)]
    return float(torch.stack(parts).double().mean()) if parts else 1.0


def most_uneven(batches: Sequence[Any], rules: BatchRules) -> list[Any]:
    """Of the batches the one whose rows tell most tensors with targets apart, and two parts of its rows.

    Returns:
        The batch, some rows and the others; nothing of batches with one row.
    """
    best, most = [], 0
    for batch in batches:
        rows = read_batch(batch, rules, 1).rows
        halves = [_rows(batch, rows, 0, rows // 2), _rows(batch, rows, rows // 2, rows)] if rows > 1 else []
        first, others = [read_batch(half, rules, 1).counts_of_group() for half in halves] or [{}, {}]
        ratios = {round(n / total, 4) for key, n in first.items() if (total := n + others.get(key, 0.0)) and n < total}
        if len(ratios) > most:
            best, most = [batch, *halves], len(ratios)
    return best


def _rows(batch: Any, rows: int, begin: int, end: int) -> Any:
    def cut(leaf: Any) -> Any:
        return leaf[begin:end] if isinstance(leaf, Tensor) and leaf.shape[:1] == (rows,) else leaf

    return tree_map(cut, batch)
