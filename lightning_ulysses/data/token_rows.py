"""Tokenized rows on disk: one file with all tokens, one with where each row ends, and a note that is written last."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lightning_ulysses.data.tokens import EncodedRows

_TOKENS, _LABELS, _ENDS, _NOTE = "tokens.bin", "labels.bin", "ends.bin", "note.json"
_TYPES: dict[str, Any] = {_TOKENS: "<i4", _LABELS: "<i4", _ENDS: "<i8"}
_BLOCK = 2**24
# Blocks of a large file whose sums are compared: a gigabyte is read in a second.
_MOST_BLOCKS = 64


@dataclass
class CacheNote:
    """What is in a folder of tokens.

    Attributes:
        documents: Rows with tokens.
        tokens: All of their tokens.
        rows: Rows read.
        skipped: Bad rows that were left out.
        bad: What is wrong with the first of them.
        sums: For each file the checksums of its blocks.
        sizes: For each file its bytes.
    """

    documents: int = 0
    tokens: int = 0
    rows: int = 0
    skipped: int = 0
    bad: list[str] = field(default_factory=list)
    sums: dict[str, list[int]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


class TokenWriter:
    """Writes rows into a folder. Labels get a file of their own once a row has others than its tokens.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.note = CacheNote()
        self._files = {name: (folder / name).open("wb") for name in (_TOKENS, _ENDS)}

    def add(self, rows: EncodedRows) -> None:
        """Appends rows."""
        note = self.note
        if rows.labels is not None and _LABELS not in self._files:
            self._files[_TOKENS].flush()
            # Up to here, tokens are their own labels.
            shutil.copyfile(self.folder / _TOKENS, self.folder / _LABELS)
            self._files[_LABELS] = (self.folder / _LABELS).open("ab")
        self._write(_TOKENS, rows.tokens)
        if _LABELS in self._files:
            self._write(_LABELS, rows.tokens if rows.labels is None else rows.labels)
        self._write(_ENDS, note.tokens + np.cumsum(rows.lengths))
        note.documents += len(rows.lengths)
        note.tokens += len(rows.tokens)
        note.rows += rows.rows
        note.skipped += len(rows.bad)
        note.bad += rows.bad[: max(0, 5 - len(note.bad))]

    def _write(self, name: str, array: NDArray[Any]) -> None:
        self._files[name].write(np.ascontiguousarray(array, dtype=_TYPES[name]).data)

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()

    def finish(self) -> None:
        """Brings everything to the disk, and the note last."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.close()
        for name in self._files:
            self.note.sizes[name] = (self.folder / name).stat().st_size
            self.note.sums[name] = [_sum(self.folder / name, block) for block in range(_blocks(self.note.sizes[name]))]
        with (self.folder / _NOTE).open("w") as note:
            json.dump(asdict(self.note), note)
            note.flush()
            os.fsync(note.fileno())


def _blocks(size: int) -> int:
    return -(-size // _BLOCK)


def _sum(file: Path, block: int) -> int:
    with file.open("rb") as content:
        content.seek(block * _BLOCK)
        return zlib.crc32(content.read(_BLOCK))


def read_note(folder: Path) -> CacheNote:
    """The note of a folder.

    Raises:
        ValueError: If it has none that can be read.
    """
    try:
        return CacheNote(**json.loads((folder / _NOTE).read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{_NOTE} cannot be read: {type(error).__name__}: {error}") from error


def find_fault(folder: Path, sums: bool = False) -> str | None:
    """What is wrong with a folder of tokens; None if nothing is.

    Args:
        folder: The folder.
        sums: Whether to compare checksums: of all blocks up to a gigabyte a file, else of some.
    """
    try:
        note = read_note(folder)
        for name, size in note.sizes.items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            blocks = _blocks(size)
            for block in sorted({*np.linspace(0, blocks - 1, min(blocks, _MOST_BLOCKS)).astype(int)} if sums else ()):
                if _sum(folder / name, int(block)) != note.sums[name][block]:
                    return f"{name} has changed around byte {block * _BLOCK}"
        expected = {_TOKENS: 4 * note.tokens, _ENDS: 8 * note.documents}
    except (OSError, ValueError, LookupError, AttributeError) as error:
        return str(error)
    wrong = [name for name, size in expected.items() if note.sizes.get(name) != size]
    return f"{_NOTE} does not fit {wrong[0]}" if wrong else None


class TokenRows(Dataset[dict[str, Any]]):
    """Tokenized rows, read from the disk as they are asked for.

    Args:
        folder: A folder that `TokenWriter` has finished.
        chosen: (documents,) the numbers of the rows to give; all of them by default.
    """

    def __init__(self, folder: Path, chosen: NDArray[Any] | None = None) -> None:
        self.folder = folder
        self.chosen = chosen
        self._open()

    def _open(self) -> None:
        note = read_note(self.folder)
        arrays = {name: np.memmap(self.folder / name, dtype=_TYPES[name], mode="r") for name in note.sizes}
        self._tokens, self._ends, self._labels = arrays[_TOKENS], arrays[_ENDS], arrays.get(_LABELS)

    def __getstate__(self) -> dict[str, Any]:
        # A copy in another process maps the same files.
        return {"folder": self.folder, "chosen": self.chosen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self._ends) if self.chosen is None else len(self.chosen)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """(documents,) tokens of each."""
        lengths = np.diff(self._ends, prepend=0).astype(np.int32)
        return lengths if self.chosen is None else lengths[self.chosen]

    def __getitem__(self, number: int) -> dict[str, Any]:
        """``input_ids`` (S,), and ``labels`` (S,) if they differ."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        row = int(number if self.chosen is None else self.chosen[number]) % len(self._ends)
        begin, end = int(self._ends[row - 1]) if row else 0, int(self._ends[row])
        found = {"input_ids": np.asarray(self._tokens[begin:end])}
        return found if self._labels is None else {**found, "labels": np.asarray(self._labels[begin:end])}

    def select(self, numbers: Sequence[int] | NDArray[Any]) -> TokenRows:
        """Some of the rows."""
        numbers = np.asarray(numbers)
        return TokenRows(self.folder, numbers if self.chosen is None else self.chosen[numbers])
