"""Finds the source of rows: files, folders, datasets, and what tells that they have changed."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_ulysses.data.readers import (
    Row,
    Rows,
    has_known_suffix,
    kind_of_file,
    read_dataset,
    read_json,
    read_lines,
    read_parquet,
    read_texts,
)
from lightning_ulysses.errors import UlyssesError

# Files of up to three such blocks are known by their whole content.
_BLOCK = 2**16
_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}


@dataclass(frozen=True)
class Corpus:
    """The source of rows.

    Args:
        source: Files, folders or globs, a folder written by ``Dataset.save_to_disk``, the name of a dataset on the hub,
            or a ``datasets.Dataset``.
        config: Configuration of the dataset, if ``source`` is a name.
        split: Split of the dataset, if ``source`` is a name or a folder.
        text_column: The column of the rows that text files become.
    """

    source: Any
    config: str | None = None
    split: str = "train"
    text_column: str = "text"

    @property
    def is_dataset(self) -> bool:
        """Whether the source is a dataset that is loaded already."""
        return hasattr(self.source, "_fingerprint") and hasattr(self.source, "column_names")

    @property
    def name(self) -> str | None:
        """The name of a dataset on the hub, or of a folder that ``datasets`` loads; None for any other source."""
        if self.is_dataset:
            return None
        patterns = self._patterns()
        if len(patterns) != 1:
            return None
        path = os.path.expanduser(patterns[0])
        return path if _is_name(path) or (os.path.isdir(path) and _is_loaded_by_datasets(path, self.config)) else None

    def _patterns(self) -> list[str]:
        source = [self.source] if isinstance(self.source, (str, os.PathLike)) else self.source
        if (
            not isinstance(source, (list, tuple))
            or not source
            or not all(isinstance(s, (str, os.PathLike)) for s in source)
        ):
            kind = type(self.source).__name__
            raise UlyssesError(
                f"data of type {kind}"
                + (f" with the splits {sorted(self.source)}" if isinstance(self.source, dict) else ""),
                "files, folders or globs, the name of a dataset, or one datasets.Dataset that has a length",
                "give one split, such as dataset['train']; or use PackedStream for rows that are streamed",
            )
        return [os.fspath(part) for part in source]

    def files(self) -> list[str]:
        """The files that the paths and globs match, in order. Empty for any other source.

        Raises:
            UlyssesError: If a path or glob matches no file.
        """
        if self.is_dataset or self.name is not None:
            return []
        found: list[str] = []
        for pattern in self._patterns():
            path = os.path.expanduser(pattern)
            if os.path.isdir(path):
                found += _files_in(path, self.split)
                continue
            # A file may be called "a [1].txt", which as a glob matches "a 1.txt".
            matches = (
                [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
            )
            if not matches:
                raise UlyssesError(
                    f"{pattern!r}, which is no file and matches none in {os.getcwd()}",
                    "files of text, JSONL or Parquet, a glob such as 'data/**/*.jsonl', or the name of a dataset",
                    "correct the path; relative ones start at the current folder",
                )
            found += matches
        return found

    def identity(self) -> Any:
        """Everything that the rows depend on, for the cache key; of a dataset on the hub `revision` as well."""
        if self.is_dataset:
            return ["dataset", self.source._fingerprint]
        if (name := self.name) is None:
            return [[kind_of_file(file), *stamp(file)] for file in self.files()]
        if not os.path.isdir(name):
            return ["name", name, self.config, self.split]
        files = sorted(str(path) for path in Path(name).rglob("*") if path.is_file())
        return ["folder", self.config, self.split, [[os.path.relpath(file, name), *stamp(file)] for file in files]]

    def revision(self) -> str | None:
        """What the hub now has under the name. None for any other source.

        Raises:
            UlyssesError: If there is no such dataset, or the hub cannot be asked.
        """
        if (name := self.name) is None or os.path.isdir(name):
            return None
        import datasets

        try:
            return str(datasets.load_dataset_builder(name, self.config).hash)
        except (FileNotFoundError, ConnectionError, ValueError) as error:
            raise self._no_dataset(name, error) from error

    def rows(self, scratch: Path) -> Rows:
        """The rows.

        Args:
            scratch: A folder for copies that are only needed now.

        Raises:
            UlyssesError: If files are of several kinds or cannot be read, or there is no such dataset.
        """
        if self.is_dataset:
            return read_dataset(self.source)
        if (name := self.name) is not None:
            return read_dataset(self._load_named(name, scratch))
        files = self.files()
        kinds = {kind_of_file(file) for file in files}
        if len(kinds - {"json"}) > 1 or (len(kinds) > 1 and "jsonl" not in kinds):
            raise UlyssesError(
                f"files of the kinds {sorted(kinds)} together",
                "files of one kind",
                "convert them, or name those of one kind with a narrower glob",
            )
        if kinds == {"text"}:
            return read_texts(files, self.text_column)
        if kinds == {"jsonl"}:
            return read_lines(files)
        if kinds == {"parquet"}:
            return read_parquet(files)
        if kinds == {"csv"}:
            return self._load_files("csv", files, scratch)
        parts = [read_json(file) if kind_of_file(file) == "json" else read_lines([file]) for file in files]
        known = [part for part in parts if part is not None]
        # Such as an object that holds the rows: `datasets` knows more forms.
        return _chained(known) if len(known) == len(files) else self._load_files("json", files, scratch)

    def _load_files(self, kind: str, files: list[str], scratch: Path) -> Rows:
        import datasets

        try:
            return read_dataset(datasets.load_dataset(kind, data_files=files, split="train", cache_dir=str(scratch)))
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise UlyssesError(
                f"{kind} files that cannot be read: {files[:3]} ({str(error.__cause__ or error)[:300]})",
                "files whose rows all have the same columns",
                "mend the files, or convert them to JSONL, one object a line",
            ) from error

    def _load_named(self, name: str, scratch: Path) -> Any:
        import datasets

        try:
            if _is_saved(name):
                return datasets.load_from_disk(name)
            # A text file is one row here as well.
            builder = datasets.load_dataset_builder(name, self.config)
            options = {"sample_by": "document"} if builder.name == "text" else {}
            # What the user's own cache holds already is not copied again.
            cache = {} if os.path.isdir(builder.cache_dir) else {"cache_dir": str(scratch)}
            return datasets.load_dataset(name, self.config, split=self.split, **options, **cache)
        except (FileNotFoundError, ConnectionError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise self._no_dataset(name, error) from error

    def _no_dataset(self, name: str, error: Exception) -> UlyssesError:
        return UlyssesError(
            f"the dataset {name!r} (configuration {self.config!r}, split {self.split!r}), which cannot be loaded: "
            f"{str(error)[:300]}",
            "a dataset on the hub or on disk with this configuration and split",
            "correct the name, the configuration or the split, or give files",
        )


def _is_name(source: str) -> bool:
    """Whether it is neither a path nor a file name, such as "wikitext" or "org/name-v1.5": a dataset on the hub."""
    if os.path.exists(source) or os.path.isabs(source) or source.startswith((".", "~")) or glob.has_magic(source):
        return False
    owner, slash, rest = source.partition("/")
    if has_known_suffix(source) or "/" in rest or os.path.isdir(owner):
        return False
    # Without an owner, "notes.rst" is a file.
    return bool(slash) or not re.search(r"\.[A-Za-z]\w*$", source)


def _is_saved(folder: str) -> bool:
    return all(os.path.isfile(os.path.join(folder, name)) for name in ("dataset_info.json", "state.json"))


def _is_loaded_by_datasets(folder: str, config: str | None) -> bool:
    """Whether a folder says by itself how it is loaded."""
    if config is not None or _is_saved(folder) or os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        return True
    card = Path(folder, "README.md")
    return card.is_file() and bool(
        re.match(r"---\n.*?^configs:", card.read_text(errors="replace"), re.DOTALL | re.MULTILINE)
    )


def _words(path: str) -> set[str]:
    """The words in the names of a file and of its folders."""
    return set(re.split(r"[-._ 0-9/\\]+", path.lower()))


def _files_in(folder: str, split: str) -> list[str]:
    """The files with data in a folder and in those below it, as far as they belong to a split.

    As in ``datasets``, a split is named by the files or by their folders. For training, these are all files if none
    names a split.
    """
    paths = sorted(path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file())
    names = [str(path) for path in paths if not any(part.startswith(".") for part in path.parts)]
    # Beside data, texts such as a README describe it.
    names = [name for name in names if kind_of_file(name) != "text"] or [
        name for name in names if not os.path.basename(name).lower().startswith(("readme", "license"))
    ]
    own = [name for name in names if _words(name) & _SPLITS.get(split, {split})]
    if split == "train" and not own:
        own = [name for name in names if not _words(name) & set().union(*_SPLITS.values())] or names
    if not own:
        raise UlyssesError(
            f"the folder {folder!r} with {len(names)} files, none of which is named for the split {split!r}",
            "files with data" if not names else f"files or folders with {split!r} in their names",
            "correct the path, or name the files by a glob",
        )
    return [os.path.join(folder, name) for name in own]


def stamp(file: str) -> list[Any]:
    """What changes when a file's content does.

    A small file is known by its content. A large one is known by its name, size and times, and by its beginning, its
    middle and its end. The time of the last change of its entry cannot be set back as that of its content can.
    """
    status = os.stat(file)
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as content:
        if status.st_size <= 3 * _BLOCK:
            digest.update(content.read())
            return [status.st_size, digest.hexdigest()]
        for place in (0, status.st_size // 2, status.st_size - _BLOCK):
            content.seek(place)
            digest.update(content.read(_BLOCK))
    times = [status.st_mtime_ns, status.st_ctime_ns]
    return [os.path.basename(file), status.st_size, *times, digest.hexdigest()]


def _chained(parts: list[Rows]) -> Rows:
    """The rows of several sources, one after the other, with numbers that go on."""

    def read() -> Iterator[Row]:
        number = 0
        for part in parts:
            for row in part.read():
                place = row.where.partition(" ")[2]
                yield row._replace(where=f"{number} {place}".strip())
                number += 1

    return replace(parts[0], read=read, total=sum(part.total or 0 for part in parts))
