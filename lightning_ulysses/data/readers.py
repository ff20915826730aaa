"""Reads rows from files one after the other, without a copy on disk."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lightning_ulysses.errors import UlyssesError

_OPEN: dict[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_TEXTS = {".txt", ".text", ".md"}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
_SOME_ROWS = 256


class Row(NamedTuple):
    """One row of a source.

    Attributes:
        where: Its number in the source, and its place in a file.
        values: Its columns, or None if it cannot be read.
        error: Why it cannot be read.
    """

    where: str
    values: Mapping[str, Any] | None
    error: str = ""


@dataclass(frozen=True)
class Rows:
    """The rows of a source.

    Attributes:
        read: Starts to read them.
        total: How many there are, for the progress bar. None if that is not known before.
        columns: The columns, or None if each row has its own.
    """

    read: Callable[[], Iterator[Row]]
    total: int | None
    columns: Sequence[str] | None = None


def kind_of_file(file: str) -> str:
    """The kind of a file by its suffix; text for one that is not known."""
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    while suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _KINDS.get(suffixes[-1] if suffixes else "", "text")


def has_known_suffix(file: str) -> bool:
    """Whether the suffix is that of a file with data."""
    return kind_of_file(file) != "text" or bool({*map(str.lower, Path(file).suffixes)} & (_TEXTS | _COMPRESSED))


def _open(file: str, mode: str, **settings: Any) -> Any:
    suffix = Path(file).suffix.lower()
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise UlyssesError(
                f"{file}, a file of zstandard", "the package that reads it", "run: pip install zstandard"
            ) from error
        return zstandard.open(file, mode, **settings)
    return _OPEN.get(suffix, open)(file, mode, **settings)


def read_texts(files: Sequence[str], column: str) -> Rows:
    """One row for each file."""

    def read() -> Iterator[Row]:
        for number, file in enumerate(files):
            with _open(file, "rt", encoding="utf-8", errors="replace") as text:
                content = text.read()
            # Text has no such character, unless it is of two or four bytes a letter.
            is_text = "\0" not in content
            yield Row(
                f"{number} ({file})", {column: content} if is_text else None, "" if is_text else "no text in UTF-8"
            )

    return Rows(read, len(files), [column])


def read_lines(files: Sequence[str]) -> Rows:
    """One row for each line that is not empty."""

    def read() -> Iterator[Row]:
        number = 0
        for file in files:
            with _open(file, "rb") as lines:
                for line_number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _parsed(f"{number} (line {line_number} of {file})", line)
                        number += 1

    return Rows(read, sum(map(_count_lines, files)))


def _count_lines(file: str) -> int:
    with _open(file, "rb") as lines:
        return sum(1 for line in lines if line.strip())


def _parsed(where: str, line: bytes) -> Row:
    try:
        values = json.loads(line)
    except ValueError as error:
        return Row(where, None, f"{type(error).__name__}: {error}")
    if not isinstance(values, dict):
        return Row(where, None, f"a JSON value of type {type(values).__name__}")
    return Row(where, values)


def read_json(file: str) -> Rows | None:
    """The rows of a file with one JSON array or one object a line; None for any other."""
    with _open(file, "rb") as source:
        first = next((line for line in source if line.strip()), b"")
        if first.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"[":
            return read_lines([file]) if _parsed("", first).values is not None else None
    with _open(file, "rb") as source:
        try:
            entries = json.loads(source.read())
        except ValueError as error:
            raise UlyssesError(
                f"{file}, which is no JSON ({error})", "a JSON array of objects, or one object a line", "mend the file"
            ) from error

    def read() -> Iterator[Row]:
        for number, values in enumerate(entries):
            where = f"{number} (entry {number} of {file})"
            is_row = isinstance(values, dict)
            yield Row(where, values if is_row else None, "" if is_row else f"a JSON {type(values).__name__}")

    return Rows(read, len(entries))


def read_parquet(files: Sequence[str]) -> Rows:
    """The rows of Parquet files, some at a time."""
    import pyarrow.parquet as pq

    def opened(file: str) -> Any:
        try:
            return pq.ParquetFile(file)
        except Exception as error:
            raise UlyssesError(
                f"{file}, which cannot be read as Parquet ({str(error)[:200]})", "a Parquet file", "write it again"
            ) from error

    tables = [opened(file) for file in files]

    def read() -> Iterator[Row]:
        number = 0
        for file in files:
            for batch in opened(file).iter_batches(_SOME_ROWS):
                for values in batch.to_pylist():
                    yield Row(f"{number} ({file})", without_nulls(values))
                    number += 1

    columns = list(dict.fromkeys(name for table in tables for name in table.schema_arrow.names))
    return Rows(read, sum(table.metadata.num_rows for table in tables), columns)


def read_dataset(dataset: Any) -> Rows:
    """The rows of a ``datasets.Dataset``."""
    own = dataset if (dataset.format or {}).get("type") == "custom" else dataset.with_format(None)

    def read() -> Iterator[Row]:
        for number in range(0, len(own), _SOME_ROWS):
            some = own[number : number + _SOME_ROWS]
            for place in range(min(_SOME_ROWS, len(own) - number)):
                yield Row(str(number + place), without_nulls({key: values[place] for key, values in some.items()}))

    return Rows(read, len(own), own.column_names)


def without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """A row of a table without the empty fields of its structures, which tables add where one row has a field."""
    return {key: _without_nulls(value) if isinstance(value, (list, dict)) else value for key, value in values.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None or key == "content"}
    if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        return [_without_nulls(entry) for entry in value]
    return value
