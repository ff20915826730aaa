"""A few tokens of a batch, as a batch of the same type."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_ulysses.batch.recognition import entries_of
from lightning_ulysses.batch.whole import WholeBatch, read_batch, rebuild
from lightning_ulysses.geometry.batch_keys import EDGE_KEYS, KEPT, MASK_KEYS, BatchRules
from lightning_ulysses.geometry.shares import even_shares, starts

_EDGES = (*EDGE_KEYS, "cu_seq_lens_k")
# Tokens of an excerpt: enough to tell candidates apart, and few enough to cost nothing.
_TOKENS, _TOKENS_PER_RANK = 48, 12
_PLACES = 9
# Chunks of this many tokens and more are cut by a slice that is as long, where its length is a prime number.
_CHUNK = 11


def excerpt(batch: Any, rules: BatchRules, *pieces: tuple[int, int]) -> Any:
    """Some tokens of every row.

    Args:
        batch: A whole batch.
        rules: How to read it.
        pieces: Where each run of tokens begins and how many it has, in the order of the sequence.
    """
    dims = read_batch(batch, rules, 1).dims

    new: dict[str, Any] = {}
    for key, value in entries_of(batch, deep=True).items():
        if key in _EDGES and value is not None:
            new[key] = _edges(value, pieces)
        elif key in dims:
            new[key] = torch.cat([value.narrow(dims[key], begin, count) for begin, count in pieces], dim=dims[key])
    return rebuild(batch, new)


def _edges(edges: Any, pieces: Sequence[tuple[int, int]]) -> Any:
    """(documents + 1,) -> (documents of the pieces + 1,), of the same type."""
    offset, found = 0, []
    for begin, count in pieces:
        found.append((torch.as_tensor(edges) - begin).clamp(0, count) + offset)
        offset += count
    # Boundaries before or after a piece fall together, and each must be there only once.
    cut = torch.cat(found).unique()
    return cut if isinstance(edges, Tensor) else cut.numpy() if hasattr(edges, "dtype") else cut.tolist()


def both_ends(seq_len: int, count: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Pieces with the lowest and the highest positions of a sequence, ``count`` tokens together."""
    # The first slices are the longer ones, and a slice that sees both ends has nothing to miss.
    return (0, count - count // 2), (seq_len - count // 2, count // 2)


def excerpts(
    batch: WholeBatch, rules: BatchRules, sp_size: int, sizes: Collection[int], *, short_first: bool = False
) -> Iterator[Any]:
    """Excerpts of several lengths from several places; the batch itself where it is short.

    Args:
        batch: The batch.
        rules: How to read it.
        sp_size: P.
        sizes: Lengths to avoid.
        short_first: Whether those of half the length come before the longest.
    """
    seq_len, targets = batch.layout.real_len, _some_target(batch, rules.ignore_index)
    longest = min(seq_len, max(_TOKENS, _TOKENS_PER_RANK * sp_size))
    lengths = (longest // 2, longest) if short_first else (longest, longest // 2)
    for count in (*lengths, longest // 3, 4 * sp_size):
        count = _length(count, seq_len, sp_size, sizes)
        if 2 * sp_size <= count < seq_len:
            if "position_ids" in batch.dims:
                # A model may ask for the highest position.
                yield excerpt(batch.template, rules, *both_ends(seq_len, count))
            for place in range(_PLACES):
                yield excerpt(batch.template, rules, ((seq_len - count) * place // (_PLACES - 1), count))
            # There may be none in all of these places.
            for target in targets:
                yield excerpt(batch.template, rules, (min(max(target - count // 2, 0), seq_len - count), count))
        else:
            yield batch.template


def _some_target(batch: WholeBatch, ignore_index: int) -> list[int]:
    """Where a target in the middle of all lies, for each tensor that may hold them."""
    found = []
    for name in batch.counts:
        kept = _kept(batch, name, ignore_index)
        if kept is not None:
            # (B, S) -> (positions with a target,)
            places = kept.any(dim=0).nonzero().flatten()
            found += [int(places[len(places) // 2])] if len(places) else []
    return found


def _kept(batch: WholeBatch, name: str, ignore_index: int) -> Tensor | None:
    """(B, S) bool, where a tensor has targets; None of another shape."""
    key = name.removesuffix(KEPT)
    if key not in batch.tensors or batch.dims.get(key) != 1 or batch.tensors[key].dim() != 2:
        return None
    is_mask = key != name or key in MASK_KEYS
    return batch.tensors[key] > 0 if is_mask else batch.tensors[key] != ignore_index


def _length(count: int, seq_len: int, sp_size: int, sizes: Collection[int]) -> int:
    """The largest good length of an excerpt up to ``count``."""
    usual = [n for n in range(count, 2 * sp_size - 1, -1) if n == seq_len or n not in sizes]
    # Rotated heads have an even size, which no parameter shows.
    odd = next((n for n in usual if n % 2), usual[0] if usual else count)
    return next((n for n in usual if _cuts_chunks(n, sp_size)), odd)


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
        kept = _kept(short, name, ignore_index)
        if kept is not None:
            # (B, S) -> for each slice (B,)
            parts += [part.any(dim=1) for part in kept.split(short.layout.shares, dim=1)]
    return float(torch.stack(parts).double().mean()) if parts else 1.0


def most_uneven(batches: Iterable[Any], rules: BatchRules) -> list[Any]:
    """Of the batches the one whose parts tell most tensors with targets apart, and these two parts.

    The parts of a batch are some of its rows and the others, or some documents of a single row and the others. Two
    batches of one row and one document make a batch of two rows.

    Returns:
        The batch and its parts; nothing if there is no such batch.
    """
    best, most = [], 0
    for batch in _with_pairs(batches, rules):
        parts = halves(batch, rules)
        first, others = [read_batch(part, rules, 1).counts_of_group() for part in parts] or [{}, {}]
        # A part without a target has no loss to compare.
        ratios = {round(n / (n + others[key]), 4) for key, n in first.items() if n and others.get(key)}
        if len(ratios) > most:
            best, most = [batch, *parts], len(ratios)
    return best


def halves(batch: Any, rules: BatchRules) -> list[Any]:
    """Some rows of a batch and the others, or some documents of its single row and the others; none of one document."""
    whole = read_batch(batch, rules, 1)
    if whole.rows > 1:
        half = whole.rows // 2
        return [_rows(batch, whole.rows, 0, half), _rows(batch, whole.rows, half, whole.rows)]
    edge = middle(whole)
    if edge is None:
        return []
    return [excerpt(batch, rules, (0, edge)), excerpt(batch, rules, (edge, whole.layout.seq_len - edge))]


def middle(whole: WholeBatch) -> int | None:
    """Where a document in the middle of a single row begins; None if there is no second document."""
    documents = whole.layout.documents[0] if whole.layout.documents else ()
    return documents[len(documents) // 2][0] if len(documents) > 1 else None


def parted_targets(batch: Any, rules: BatchRules, name: str) -> list[Any]:
    """A batch, and the same twice with some of its targets each, that together are all of them.

    For a batch whose rows cannot be told from each other, such as one with images of all of them.

    Args:
        batch: A whole batch.
        rules: How to read it.
        name: The tensor with the targets, as `WholeBatch.counts` calls it.

    Returns:
        The batch and its parts; nothing if the tensor has too few targets, or they cannot be ignored.
    """
    key = _key_of(batch, name)
    given = entries_of(batch, deep=True).get(key)
    is_mask = key in MASK_KEYS
    if not isinstance(given, Tensor) or given.dim() != 2 or not (is_mask or _is_signed(given)):
        return []
    ignored = 0 if is_mask else rules.ignore_index
    marked = given.clone()
    if bool((given != ignored).any()):
        # Labels and shifted ones differ: a sequence that begins with a label.
        marked[0, 0] = given[given != ignored][0]
    valid = marked != ignored
    if bool(valid.any()) and int(valid.sum()) < 6:
        # Too few to part.
        marked = marked.masked_fill(~valid, marked[valid][0])
        valid = torch.ones_like(valid)
    # A third of them, in the order of rows.
    first = valid & (valid.flatten().cumsum(0).view_as(valid) <= int(valid.sum()) // 3)
    if int(first.sum()) < 2:
        return []
    parts = (valid, first, valid & ~first)
    return [rebuild(batch, {key: marked.masked_fill(~part, ignored)}) for part in parts]


def with_fewer_targets(batch: Any, rules: BatchRules, name: str, tokens: int) -> Any:
    """A batch in which the first half of the rows has two or three targets left in the first tokens.

    Args:
        batch: A whole batch.
        rules: How to read it.
        name: The tensor with the targets, as `WholeBatch.counts` calls it.
        tokens: How many of each of these rows are changed.

    Returns:
        The batch; None if the tensor has no targets to spare, or its targets cannot be ignored.
    """
    key = _key_of(batch, name)
    given = entries_of(batch, deep=True).get(key)
    is_mask = key in MASK_KEYS or name.endswith(KEPT)
    if not isinstance(given, Tensor) or given.dim() != 2 or (not is_mask and not _is_signed(given)):
        return None
    if read_batch(batch, rules, 1).dims.get(key, 1) != 1:
        return None
    valid = given > 0 if is_mask else given != rules.ignore_index
    half = -(-len(given) // 2)
    # (B / 2, tokens); the last two of each row stay.
    spare = valid[:half, :tokens] & (valid[:half, :tokens].flip(1).cumsum(1).flip(1) > 2)
    if not bool(valid.any()):
        return None
    fewer, ignored = given.clone(), 0 if is_mask else rules.ignore_index
    fewer[:half, :tokens][spare] = ignored
    # Labels and shifted ones differ: a sequence that begins with a label, and one that lies behind a cut.
    fewer[:, tokens : tokens + 1] = ignored
    fewer[:, 0] = torch.where(valid[:, 0], given[:, 0], given[valid][0])
    return None if torch.equal(fewer, given) else rebuild(batch, {key: fewer})


def _key_of(batch: Any, name: str) -> str:
    """The key of a tensor of targets that may have been shifted here."""
    key = name.removesuffix(KEPT)
    return key if key in entries_of(batch, deep=True) else key.removeprefix("shift_")


def _is_signed(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int8, torch.int16, torch.int32, torch.int64)


def _rows(batch: Any, rows: int, begin: int, end: int) -> Any:
    def cut(leaf: Any) -> Any:
        return leaf[begin:end] if isinstance(leaf, Tensor) and leaf.shape[:1] == (rows,) else leaf

    return tree_map(cut, batch)


def _with_pairs(batches: Iterable[Any], rules: BatchRules) -> Iterator[Any]:
    """The batches, and pairs of neighbours that have one row of one document each."""
    before: Any = None
    for batch in batches:
        yield batch
        whole = read_batch(batch, rules, 1)
        is_single = whole.rows == 1 and not (whole.layout.documents and len(whole.layout.documents[0]) > 1)
        # Edges of documents are those of one row.
        is_single = is_single and not any(key in _EDGES for key in entries_of(batch, deep=True))
        if is_single and before is not None and before[1] == whole.layout.seq_len:
            yield _stacked(before[0], batch)
        before = (batch, whole.layout.seq_len) if is_single else None


def _stacked(first: Any, second: Any) -> Any:
    """Batches of one row as one of two rows."""

    def stack(one: Any, other: Any) -> Any:
        is_row = isinstance(one, Tensor) and one.shape[:1] == (1,) and one.shape[1:] == other.shape[1:]
        return torch.cat([one, other]) if is_row else one

    return tree_map(stack, first, second)
