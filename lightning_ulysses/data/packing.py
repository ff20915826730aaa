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

# Of 32 bits where the values allow, since there may be many millions of documents.
Ints = NDArray[np.integer[Any]]
# Pieces and packs that are worked on at a time, and empty packs that are kept at hand in each window.
_SOME, _SOME_PACKS, _EMPTY = 2**20, 2**16, 8
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

    Nothing but the lengths is kept for every piece. Most pieces are whole documents, whose number follows from theirs.

    Attributes:
        lengths: (pieces,) tokens of each.
        max_tokens: Most tokens of a piece.
        cut: (documents,) the numbers of the documents that are cut into several pieces, rising.
        more: (documents,) how many pieces each of these has beside its first one.
        kept: (pieces,) the document of each piece, if some documents are in none.
        overlong: Number of documents longer than ``max_tokens``.
        lost_tokens: Tokens that are in no piece.
    """

    lengths: Ints
    max_tokens: int
    cut: Ints
    more: Ints
    kept: Ints | None = None
    overlong: int = 0
    lost_tokens: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def locate(self, pieces: Ints) -> tuple[Ints, Ints]:
        """For each of some pieces its document, and its first token in that document."""
        pieces = pieces.astype(np.int64)
        if self.kept is not None:
            return self.kept[pieces].astype(np.int64), np.zeros_like(pieces)
        if not len(self.cut):
            return pieces, np.zeros_like(pieces)
        through = np.cumsum(self.more)
        firsts = self.cut + through - self.more
        # The cut document at or before each piece; -1 if there is none.
        before = np.searchsorted(firsts, pieces, side="right") - 1
        offset = pieces - firsts[before]
        is_part = (before >= 0) & (offset <= self.more[before])
        whole = pieces - np.where(before >= 0, through[before], 0)
        return np.where(is_part, self.cut[before], whole), np.where(is_part, offset * self.max_tokens, 0)

    @property
    def index(self) -> Ints:
        """(pieces,) the document of each piece."""
        return self.locate(np.arange(len(self)))[0]

    @property
    def begin(self) -> Ints:
        """(pieces,) its first token in that document."""
        return self.locate(np.arange(len(self)))[1]

    @property
    def end(self) -> Ints:
        """(pieces,) one past its last token."""
        return self.begin + self.lengths


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

    def sums(self, values: Ints, power: int = 1) -> NDArray[np.int64]:
        """(packs,) the sum of ``values`` over each pack; ``values`` has one entry per piece.

        Args:
            values: (pieces,).
            power: The power to which each value is raised, 1 or 2.
        """
        sums = np.empty(len(self), dtype=np.int64)
        # Some packs at a time: 64-bit copies of all pieces would take more than all else.
        for first in range(0, len(self), _SOME_PACKS):
            edges = self.offsets[first : first + _SOME_PACKS + 1]
            some = values[self.members[edges[0] : edges[-1]]].astype(np.int64)
            sums[first : first + _SOME_PACKS] = np.add.reduceat(
                some * some if power == 2 else some, edges[:-1] - edges[0]
            )
        return sums

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
    return array.astype(_narrow(int(array.max())))


def _narrow(largest: int) -> Any:
    return np.int32 if largest < 2**31 else np.int64


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
    longer = np.flatnonzero(lengths > max_tokens)
    none = np.empty(0, dtype=np.int64)
    if not longer.size:
        return Pieces(lengths, max_tokens, none, none)
    if overlong == "error":
        raise UlyssesError(
            f"document {longer[0]} of {lengths[longer[0]]} tokens with max_tokens={max_tokens} "
            f"({longer.size} of {len(lengths)} documents are longer)",
            "no document longer than a pack, since overlong='error'",
            f"set overlong='split', 'truncate' or 'drop', or max_tokens={lengths.max()}",
        )
    if overlong == "split":
        more = (lengths[longer].astype(np.int64) - 1) // max_tokens
        rest = lengths.copy()
        rest[longer] -= (more * max_tokens).astype(lengths.dtype)
        # Whole pieces in front of the last one of each document.
        made = np.insert(rest, np.repeat(longer, more), max_tokens).astype(np.int32, copy=False)
        return Pieces(made, max_tokens, longer, more, overlong=longer.size)
    if overlong == "truncate":
        kept, made = None, np.minimum(lengths, max_tokens).astype(np.int32, copy=False)
    else:
        kept = np.flatnonzero(lengths <= max_tokens).astype(_narrow(len(lengths)))
        made = lengths[kept].astype(np.int32, copy=False)
        if not kept.size:
            raise UlyssesError(
                f"a dataset whose {len(lengths)} documents are all longer than max_tokens={max_tokens}",
                "something left after overlong='drop'",
                f"set overlong='split', or max_tokens={lengths.max()}",
            )
    lost = int(lengths.sum(dtype=np.int64) - made.sum(dtype=np.int64))
    return Pieces(made, max_tokens, none, none, kept, longer.size, lost)


def random_order(count: int, *key: int) -> Ints:
    """A permutation of ``count`` numbers that depends on ``key`` alone, not on the version of numpy.

    A resumed run must find the same packs again. Numpy keeps the raw stream of a bit generator stable, but not the
    result of ``Generator.permutation``.
    """
    bits = np.uint64(count.bit_length())
    # The low bits of each number hold its position. Sorting such numbers takes half the time of an argsort.
    drawn = np.random.PCG64(list(key)).random_raw(count)
    drawn >>= bits
    drawn <<= bits
    for begin in range(0, count, _SOME):
        drawn[begin : begin + _SOME] |= np.arange(begin, min(begin + _SOME, count), dtype=np.uint64)
    drawn.sort()
    drawn &= np.uint64((1 << int(bits)) - 1)
    return drawn.astype(_narrow(count))


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
    members = np.empty(len(order), dtype=_narrow(len(lengths)))
    sizes: list[Ints] = []
    packed = 0
    while order.size:
        rows = max(1, _total(lengths, order) // (window * max_tokens))
        width = -(-len(order) // rows)
        # Windows that fit into the caches of a processor, and whose copies take little memory.
        some = max(1, min(2**16 // window, 2 * _SOME // width))
        left: list[Ints] = []
        for first in range(0, rows, some):
            pieces, needs = _windows(lengths, order, rows, slice(first, min(first + some, rows)), max_tokens)
            packs, again = _pack_windows(pieces, needs, max_tokens, rows > 1)
            members[packed : packed + len(packs.members)] = packs.members
            packed += len(packs.members)
            sizes.append(packs.sizes)
            left.append(again)
        order = np.concatenate(left)
    return Packs(members, np.concatenate([[0], *sizes]).cumsum())


def _total(lengths: Ints, order: Ints) -> int:
    """All tokens of some pieces."""
    return sum(int(lengths[order[i : i + _SOME]].sum(dtype=np.int64)) for i in range(0, len(order), _SOME))


def _pack_windows(pieces: Ints, needs: Ints, max_tokens: int, may_leave: bool) -> tuple[Packs, Ints]:
    """The packs of some windows, and the pieces of the emptiest pack of each, if it may leave one."""
    chosen, free = _fill(needs, max_tokens)
    keep = pieces >= 0
    again = np.zeros_like(keep)
    if may_leave:
        used = free < max_tokens
        emptiest = np.where(used, free, -1).argmax(axis=1)
        # A window with a single pack keeps it. Otherwise the loop would never end.
        again = keep & (chosen == emptiest[:, None]) & (used.sum(axis=1) > 1)[:, None]
        keep &= ~again
    number = chosen + (np.arange(len(pieces)) * free.shape[1])[:, None]
    return group(pieces[keep], number[keep]), pieces[again]


def _windows(lengths: Ints, order: Ints, rows: int, chosen: slice, max_tokens: int) -> tuple[Ints, Ints]:
    """Some of the windows into which ``order`` falls, longest piece first and filled up with -1, and their tokens.

    Args:
        lengths: (pieces,) tokens.
        order: Piece numbers.
        rows: How many windows there are. They differ by at most one piece: the gaps lie in the last column.
        chosen: The windows to give.
        max_tokens: At least the longest length.

    Returns:
        (windows, width) piece numbers, and (windows, width) tokens.
    """
    width = -(-len(order) // rows)
    pieces = np.full((chosen.stop - chosen.start, width), -1, dtype=order.dtype)
    pieces[:, :-1] = order[chosen.start * (width - 1) : chosen.stop * (width - 1)].reshape(len(pieces), width - 1)
    last = order[rows * (width - 1) :][chosen]
    pieces[: len(last), -1] = last
    needs = lengths[pieces].astype(np.int64)
    needs[pieces < 0] = 0
    # The column in the low bits: a stable argsort in one sort.
    bits = width.bit_length()
    ranked = (max_tokens - needs) << bits | np.arange(width)
    ranked = ranked.astype(np.uint32 if max_tokens.bit_length() + bits <= 32 else np.int64, copy=False)
    ranked.sort(axis=1)
    columns = (ranked & ranked.dtype.type((1 << bits) - 1)).astype(np.int64)
    return np.take_along_axis(pieces, columns, axis=1), max_tokens - (ranked >> ranked.dtype.type(bits)).astype(
        np.int64
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
    # Any two packs of a row hold more than one capacity, so there are fewer than twice as many as full ones.
    most = 2 * int(needs.sum(axis=1).max()) // capacity + 2 + _EMPTY
    bits = most.bit_length()
    # The pack in the low bits, its room above: the least number tells the fullest pack that has enough room. Without
    # enough room, the unsigned difference is larger than any room.
    kind: Any = np.uint32 if capacity.bit_length() + bits < 32 else np.uint64
    columns = np.ascontiguousarray(needs.T, dtype=kind) << kind(bits)
    packs = np.arange(most, dtype=kind)[:, None] | np.full(rows, capacity << bits, dtype=kind)
    left, least = np.empty_like(packs), np.empty(rows, dtype=kind)
    chosen = np.empty((width, rows), dtype=np.int64)
    flat, every = packs.reshape(-1), np.arange(rows)
    opened = _EMPTY
    for number, need in enumerate(columns):
        np.subtract(packs[:opened], need, out=left[:opened])
        np.minimum.reduce(left[:opened], axis=0, out=least)
        best = np.bitwise_and(least, kind((1 << bits) - 1), out=chosen[number], casting="unsafe")
        flat[best * rows + every] = least
        # Each piece opens one pack at most.
        if number % _EMPTY == _EMPTY - 1 or opened < 2 * _EMPTY:
            opened = min(most, max(opened, int(chosen[max(0, number - _EMPTY) : number + 1].max()) + 2 + _EMPTY))
    return chosen.T, (packs[:opened] >> kind(bits)).T.astype(np.int64)
