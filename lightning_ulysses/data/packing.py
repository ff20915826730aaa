"""Decides which documents share a pack: best-fit decreasing within shuffled windows, in numpy alone.

`fit_to_packs` first cuts documents that are too long. Then `best_fit` packs the pieces. A pack holds at most
``max_tokens`` tokens. All functions are pure: the same arguments give the same packs on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args

import numpy as np
from numpy.typing import NDArray

from lightning_ulysses.errors import UlyssesError

Ints = NDArray[np.int64]
Overlong = Literal["split", "truncate", "drop", "error"]


@dataclass(frozen=True)
class Piece:
    """Tokens ``begin`` to ``end`` (exclusive) of document ``index``, for a pack that does not hold all of it.

    It is neither a number nor a tuple. So a dataset that gets one as index by mistake fails, instead of returning other
    rows.
    """

    index: int
    begin: int
    end: int

    def __index__(self) -> NoReturn:
        """Called when a list of documents is indexed with this. A list cannot return a part of a document."""
        raise _taken_for_a_number(f"tokens {self.begin} to {self.end} of document {self.index}")


class Pack(list[int | Piece]):
    """A list with the number of each whole document, and a `Piece` for each part of one."""

    def __index__(self) -> NoReturn:
        """Called when a list of documents is indexed with this. A list cannot return several documents."""
        raise _taken_for_a_number(f"a pack of {len(self)} documents")


def _taken_for_a_number(what: str) -> UlyssesError:
    return UlyssesError(
        f"a dataset that was asked for {what}, and takes one number at a time",
        "a dataset that answers a pack with the rows of its documents",
        "give the DataLoader sampler.packed as its dataset, in place of the documents",
    )


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents that each fit into a pack; one entry per piece.

    Attributes:
        index: (pieces,) the document of each piece.
        begin: (pieces,) its first token in that document.
        end: (pieces,) one past its last token.
        overlong: Number of documents longer than ``max_tokens``.
        lost_tokens: Tokens that are in no piece.
    """

    index: Ints
    begin: Ints
    end: Ints
    overlong: int = 0
    lost_tokens: int = 0

    @property
    def lengths(self) -> Ints:
        """(pieces,) tokens of each."""
        return self.end - self.begin


@dataclass(frozen=True)
class Packs:
    """Pieces grouped by pack.

    Attributes:
        members: (pieces,) piece numbers. Those of one pack are adjacent, the longest first.
        offsets: (packs + 1,) where in ``members`` each pack begins.
    """

    members: Ints
    offsets: Ints

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> Ints:
        """(packs,) the number of pieces in each."""
        return np.diff(self.offsets)

    def sums(self, values: Ints) -> Ints:
        """(packs,) the sum of ``values`` over each pack; ``values`` has one entry per piece."""
        return np.add.reduceat(values[self.members], self.offsets[:-1])

    def __getitem__(self, pack: int) -> Ints:
        return self.members[self.offsets[pack] : self.offsets[pack + 1]]


def check_lengths(lengths: Any, documents: int) -> Ints:
    """Checks the lengths of documents, and returns them as an array.

    Args:
        lengths: Anything that numpy turns into a vector.
        documents: How many lengths there should be.

    Returns:
        (documents,) tokens of each.

    Raises:
        UlyssesError: If they are not positive integers, one per document, or if there are none.
    """
    array = np.asarray(lengths)
    if documents == 0:
        raise UlyssesError("an empty dataset", "at least one document", "check the path or the filter of the dataset")
    if array.ndim != 1 or len(array) != documents:
        raise UlyssesError(
            f"lengths of shape {array.shape} for a dataset of {documents} documents",
            f"one length per document, shape ({documents},)",
            "compute the lengths from the very dataset that is loaded, after any filter or selection",
        )
    if array.dtype.kind not in "iu":
        raise UlyssesError(
            f"lengths of type {array.dtype}, such as {array[0]!r}",
            "integers: the number of tokens of each document",
            "pass integers, such as lengths=[len(row['input_ids']) for row in dataset]",
        )
    wrong = np.flatnonzero(array <= 0)
    if wrong.size:
        raise UlyssesError(
            f"a length of {array[wrong[0]]} for document {wrong[0]} ({wrong.size} documents are not positive)",
            "at least one token in each document",
            "filter such documents out of the dataset",
        )
    return array.astype(np.int64)


def check_overlong(overlong: object) -> None:
    """Raises `UlyssesError` unless ``overlong`` is one of the values that `fit_to_packs` knows."""
    if overlong not in get_args(Overlong):
        raise UlyssesError(f"overlong={overlong!r}", f"one of {get_args(Overlong)}", "choose one of them")


def fit_to_packs(lengths: Ints, max_tokens: int, overlong: Overlong) -> Pieces:
    """Handles documents that are longer than a pack.

    Args:
        lengths: (documents,) tokens.
        max_tokens: Most tokens of a pack.
        overlong: ``"split"`` cuts them into pieces of ``max_tokens`` and a remainder. ``"truncate"`` keeps their first
            ``max_tokens`` tokens. ``"drop"`` leaves them out. ``"error"`` refuses them.

    Raises:
        UlyssesError: For such a document with ``"error"``; if ``"drop"`` leaves no document; for any other value.
    """
    check_overlong(overlong)
    index = np.arange(len(lengths))
    longer = np.flatnonzero(lengths > max_tokens)
    if longer.size and overlong == "error":
        raise UlyssesError(
            f"document {longer[0]} of {lengths[longer[0]]} tokens with max_tokens={max_tokens} "
            f"({longer.size} of {len(lengths)} documents are longer)",
            "no document longer than a pack, since overlong='error'",
            f"set overlong='split', 'truncate' or 'drop', or max_tokens={lengths.max()}",
        )
    if overlong == "split":
        counts = -(-lengths // max_tokens)
        index = np.repeat(index, counts)
        begin = (np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)) * max_tokens
        return Pieces(index, begin, np.minimum(begin + max_tokens, lengths[index]), longer.size)
    if overlong == "drop":
        index = np.flatnonzero(lengths <= max_tokens)
        if not index.size:
            raise UlyssesError(
                f"a dataset whose {len(lengths)} documents are all longer than max_tokens={max_tokens}",
                "something left after overlong='drop'",
                f"set overlong='split', or max_tokens={lengths.max()}",
            )
    end = np.minimum(lengths[index], max_tokens)
    return Pieces(index, np.zeros_like(index), end, longer.size, int(lengths.sum() - end.sum()))


def random_order(count: int, *key: int) -> Ints:
    """A permutation of ``count`` numbers that depends on ``key`` alone, not on the version of numpy.

    A resumed run must find the same packs again. Numpy keeps the raw stream of a bit generator stable, but not the
    result of ``Generator.permutation``.
    """
    bits = np.uint64(count.bit_length())
    # The low bits of each number hold its position. Sorting such numbers takes half the time of an argsort.
    drawn = np.random.PCG64(list(key)).random_raw(count) >> bits << bits
    ordered = np.sort(drawn | np.arange(count, dtype=np.uint64))
    return (ordered & np.uint64((1 << int(bits)) - 1)).astype(np.int64)


def group(members: Ints, packs: Ints) -> Packs:
    """Groups pieces by pack.

    Args:
        members: (pieces,) piece numbers.
        packs: (pieces,) for each the number of its pack, any number >= 0. Pieces of one pack keep their order.
    """
    # The pack in the high bits and the position in the low ones: a stable argsort in one sort.
    ordered = np.sort((packs << 32) | np.arange(len(packs)))
    starts = np.flatnonzero(np.diff(ordered >> 32)) + 1
    offsets = np.concatenate([[0], starts, [len(members)]])
    return Packs(members[ordered & 0xFFFFFFFF], offsets)


def best_fit(lengths: Ints, order: Ints, max_tokens: int, window: int) -> Packs:
    """Packs pieces within windows of ``order``: the longest first, each into the fullest pack that has room for it.

    Then the emptiest pack of each window is taken apart. The pieces of these packs are packed again, in windows of
    their own.

    Args:
        lengths: (pieces,) tokens, none above ``max_tokens``.
        order: Piece numbers, shuffled or not. Only these are packed.
        max_tokens: Most tokens of a pack, below 2**31.
        window: Tokens in a window, as a number of full packs. With larger windows, packs are fuller, but the order of
            the pieces has less influence on which of them share a pack.
    """
    members: list[Ints] = []
    packs: list[Ints] = []
    numbered = 0
    while order.size:
        rows = max(1, int(lengths[order].sum()) // (window * max_tokens))
        pieces, needs = _windows(lengths, order, rows)
        chosen, free = _fill(needs, max_tokens)
        keep = pieces >= 0
        if rows > 1:
            used = free < max_tokens
            emptiest = np.where(used, free, -1).argmax(axis=1)
            # A window with a single pack keeps it. Otherwise the loop would never end.
            again = keep & (chosen == emptiest[:, None]) & (used.sum(axis=1) > 1)[:, None]
            keep &= ~again
            order = pieces[again]
        else:
            order = order[:0]
        number = chosen + (numbered + np.arange(rows) * free.shape[1])[:, None]
        members.append(pieces[keep])
        packs.append(number[keep])
        numbered += rows * free.shape[1]
    return group(np.concatenate(members), np.concatenate(packs))


def _windows(lengths: Ints, order: Ints, rows: int) -> tuple[Ints, Ints]:
    """``order`` as windows (rows, width), longest first and filled up with -1, and the tokens of each piece."""
    width = -(-len(order) // rows)
    pieces = np.full(rows * width, -1)
    needs = np.zeros(rows * width, dtype=np.int64)
    # Rows differ by at most one piece: the gaps lie in the last column, instead of all in the last row.
    places = np.arange(rows * width).reshape(rows, width)
    places = np.concatenate([places[:, :-1].ravel(), places[: len(order) - rows * (width - 1), -1]])
    pieces[places] = order
    needs[places] = lengths[order]
    ranked = (needs.max() - needs).reshape(rows, width) << 32 | np.arange(width)
    columns = np.sort(ranked, axis=1) & 0xFFFFFFFF
    return (
        np.take_along_axis(pieces.reshape(rows, width), columns, axis=1),
        np.take_along_axis(needs.reshape(rows, width), columns, axis=1),
    )


def _fill(needs: Ints, capacity: int) -> tuple[Ints, Ints]:
    """Best fit in all rows at once, one column after the other.

    Args:
        needs: (rows, width) tokens, falling along a row. Zeros at its end stand for no piece.
        capacity: Most tokens of a pack, below 2**31.

    Returns:
        (rows, width) the pack of each piece within its row, and (rows, packs) the room left. In an unused pack, all of
        it is left.
    """
    rows, width = needs.shape
    small = capacity < 2**15
    signed, unsigned = (np.int16, np.uint16) if small else (np.int32, np.uint32)
    columns = np.ascontiguousarray(needs.T, dtype=signed)
    free = np.full((rows, int(needs.sum(axis=1).max()) // capacity + 8), capacity, dtype=signed)
    chosen = np.empty((width, rows), dtype=np.int64)
    scratch = np.empty(free.size, dtype=signed)
    every = np.arange(rows)
    opened = 1
    for need, best in zip(columns, chosen, strict=True):
        if opened > free.shape[1]:
            free = np.concatenate([free, np.full_like(free, capacity)], axis=1)
            scratch = np.empty(free.size, dtype=signed)
        slack = scratch[: rows * opened].reshape(rows, opened)
        np.subtract(free[:, :opened], need[:, None], out=slack)
        # As an unsigned number, negative slack is larger than any room. So argmin picks the fullest pack with enough
        # room, and an empty pack only if no other has room.
        slack.view(unsigned).argmin(axis=1, out=best)
        free[every, best] -= need
        opened = max(opened, int(best.max()) + 2)
    return chosen.T, free.astype(np.int64)
