"""The buffer of documents that wait to be packed, and one pass over a source that packs them."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from lightning_ulysses.data.packing import Overlong
from lightning_ulysses.data.rows import read_row, without_targets
from lightning_ulysses.data.source import fingerprint
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.shares import even_shares

Pack = list[dict[str, Tensor]]


class Waiting(NamedTuple):
    """A document, or a piece of one: tokens ``begin:end`` of document ``number`` of the source."""

    number: int
    begin: int
    end: int
    document: dict[str, Tensor]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.end - self.begin


class BestFitBuffer:
    """Builds one pack at a time: first the oldest waiting document, then those that fill the rest best.

    Starting with the oldest document roughly keeps the order of the source. It also keeps any document from waiting
    forever.

    Args:
        max_tokens: Most tokens of a pack. Every document must fit.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.tokens = 0
        self._waiting: dict[int, Waiting] = {}
        # (length, -arrival): among documents of equal length the oldest comes last.
        self._by_length: list[tuple[int, int]] = []
        self._arrivals = 0

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._waiting.values())

    def add(self, item: Waiting) -> None:
        """Adds one document."""
        self._waiting[self._arrivals] = item
        insort(self._by_length, (item.length, -self._arrivals))
        self._arrivals += 1
        self.tokens += item.length

    def take(self) -> Pack:
        """Removes one pack from the buffer, which must not be empty."""
        oldest = next(iter(self._waiting))
        place = bisect_right(self._by_length, (self._waiting[oldest].length, -oldest)) - 1
        pack, room = [], self.max_tokens
        while place >= 0:
            _, negative = self._by_length.pop(place)
            item = self._waiting.pop(-negative)
            pack.append(item.document)
            room -= item.length
            # -arrival is never positive, so (room, 1) sorts after every document of exactly `room` tokens.
            place = bisect_right(self._by_length, (room, 1)) - 1
        self.tokens -= self.max_tokens - room
        return pack


@dataclass(frozen=True)
class PackingRules:
    """The settings that the packs of a source depend on.

    Args:
        max_tokens: Most tokens of a pack.
        overlong: How to handle longer documents.
        buffer_tokens: Tokens that must wait in the buffer before a pack is built.
    """

    max_tokens: int
    overlong: Overlong
    buffer_tokens: int


class PackingPass:
    """One pass over a source, from its start or from a saved state. Every rank and worker makes the same pass.

    Args:
        rules: The settings of the packs.
        read: Starts to read the source.
        state: The `state_dict` of an earlier pass over the same source.

    Attributes:
        documents: Documents of the source read so far.
        left_out: Documents truncated or dropped for their length, and the tokens lost with them.
    """

    def __init__(self, rules: PackingRules, read: Callable[[], Iterator[Any]], state: Mapping[str, Any] | None) -> None:
        self.rules = rules
        self.documents = 0
        self.left_out = {"documents": 0, "tokens": 0}
        self._read = read
        self._state = state
        self._buffer = BestFitBuffer(rules.max_tokens)
        self._checksum = 0

    def _pieces(self, tokens: int) -> list[tuple[int, int]]:
        """The pieces (begin, end) of a document of ``tokens`` tokens, each of at most ``max_tokens`` tokens."""
        most, overlong = self.rules.max_tokens, self.rules.overlong
        if tokens <= most:
            return [(0, tokens)]
        if overlong == "error":
            raise UlyssesError(
                f"document {self.documents} of the source with {tokens} tokens",
                f"documents of at most max_tokens={most} tokens with overlong='error'",
                "raise max_tokens, or set overlong to 'split', 'truncate' or 'drop'",
            )
        if overlong == "split":
            return [(begin, min(begin + most, tokens)) for begin in range(0, tokens, most)]
        self.left_out["documents"] += 1
        self.left_out["tokens"] += tokens - most if overlong == "truncate" else tokens
        return [(0, most)] if overlong == "truncate" else []

    def _fill(self, row: Any, pieces: list[tuple[int, int]] | None = None) -> None:
        """Counts one row and buffers its pieces. For a row that is read again, buffers only ``pieces``."""
        if pieces is None or pieces:
            document = read_row(row)
            for begin, end in self._pieces(len(document["input_ids"])) if pieces is None else pieces:
                part = {key: tensor[begin:end] for key, tensor in document.items()}
                self._buffer.add(Waiting(self.documents, begin, end, part))
        self._checksum = fingerprint(row, self._checksum)
        self.documents += 1

    def _resume(self, rows: Iterator[Any], state: Mapping[str, Any]) -> None:
        """Reads up to the place of the saved state, and buffers only the pieces that waited there."""
        waiting: dict[int, list[tuple[int, int]]] = {}
        for number, begin, end in state["waiting"]:
            waiting.setdefault(number, []).append((begin, end))
        for row in islice(rows, state["documents"]):
            self._fill(row, waiting.get(self.documents, []))
        if (self.documents, self._checksum) != (state["documents"], state["checksum"]):
            raise UlyssesError(
                f"a source whose first {self.documents} documents have checksum {self._checksum:08x}",
                f"the source that the state was saved with, {state['documents']} documents of checksum "
                f"{state['checksum']:08x} in",
                "resume with the same source in the same order, or start afresh",
            )
        self.left_out = dict(state["left_out"])

    def packs(self) -> Iterator[Pack]:
        """The packs, in order."""
        rows = self._read()
        state, self._state = self._state, None
        if state is not None:
            self._resume(rows, state)
        for row in rows:
            self._fill(row)
            while self._buffer.tokens >= self.rules.buffer_tokens:
                yield self._buffer.take()
        while self._buffer.tokens:
            yield self._buffer.take()

    def state_dict(self) -> dict[str, Any]:
        """The place of the pass: the number of documents read, and which of them still wait."""
        if self._state is not None:
            return dict(self._state)
        return {
            "documents": self.documents,
            "checksum": self._checksum,
            "waiting": [(item.number, item.begin, item.end) for item in self._buffer],
            "left_out": dict(self.left_out),
        }


def _tokens(pack: Pack) -> int:
    return sum(len(document["input_ids"]) for document in pack)


def spread(packs: list[Pack], ranks: int) -> list[list[Pack]]:
    """Deals the last packs, which are too few for a whole round.

    Packs are split between documents until there is one for every rank. A rank for which no document is left gets a
    copy of the last pack with all targets ignored.

    Args:
        packs: At least one pack.
        ranks: Number of data-parallel ranks.

    Returns:
        For each rank at least one pack.
    """
    packs = list(packs)
    while len(packs) < ranks and any(len(pack) > 1 for pack in packs):
        place = max((i for i, pack in enumerate(packs) if len(pack) > 1), key=lambda i: _tokens(packs[i]))
        packs[place : place + 1] = [packs[place][::2], packs[place][1::2]]
    rest = iter(packs)
    shares = [list(islice(rest, share)) for share in even_shares(len(packs), ranks)]
    return [share or [[without_targets(document) for document in packs[-1]]] for share in shares]
