"""Finds rows, tokenizes them once and stores them on disk as Arrow files, all with ``datasets``."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_ulysses.data.tokens import RowEncoder, kind_of_rows
from lightning_ulysses.errors import UlyssesError

# Part of every cache key. Raise it when a change of the code gives other tokens for the same rows.
_FORMAT = 1
_BUILDERS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv"}
_COMPRESSED = {".gz", ".zst", ".bz2", ".xz"}


@dataclass(frozen=True)
class Corpus:
    """The source of rows.

    Args:
        source: Files or globs, a folder written by ``Dataset.save_to_disk``, the name of a dataset on the hub, or a
            ``datasets.Dataset``.
        config: Configuration of the dataset, if ``source`` is a name.
        split: Split of the dataset, if ``source`` is a name.
    """

    source: Any
    config: str | None = None
    split: str = "train"

    def files(self) -> list[str]:
        """The files that the paths and globs match, in order. Empty for any other source.

        Raises:
            UlyssesError: If a path or glob matches no file.
        """
        patterns = [self.source] if isinstance(self.source, (str, os.PathLike)) else self.source
        if not isinstance(patterns, (list, tuple)) or (len(patterns) == 1 and self._is_name(str(patterns[0]))):
            return []
        found: list[str] = []
        for pattern in map(str, patterns):
            matches = sorted(filter(os.path.isfile, glob.glob(os.path.expanduser(pattern), recursive=True)))
            if not matches:
                raise UlyssesError(
                    f"{pattern!r}, which is no file and matches none in {os.getcwd()}",
                    "files of text, JSONL or Parquet, a glob such as 'data/**/*.jsonl', or the name of a dataset",
                    "correct the path; relative ones start at the current folder",
                )
            found += matches
        return found

    @staticmethod
    def _is_name(source: str) -> bool:
        path = os.path.expanduser(source)
        if os.path.isdir(path):
            return True
        # Neither a path nor a file name, such as "wikitext" or "org/name": a dataset on the hub.
        looks_like_files = glob.has_magic(source) or os.path.isabs(path) or source.startswith((".", "~"))
        return not looks_like_files and not os.path.exists(path) and _builder(source) == "text" and "." not in source

    def identity(self) -> Any:
        """Everything that the rows depend on, for the cache key."""
        if hasattr(self.source, "_fingerprint"):
            return self.source._fingerprint
        if files := self.files():
            stats = [(os.path.abspath(file), os.stat(file)) for file in files]
            return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        return [str(self.source), self.config, self.split]

    def load(self, cache_dir: Path) -> Any:
        """The rows as a ``datasets.Dataset``.

        Raises:
            UlyssesError: If files are of several kinds, or there is no such dataset.
        """
        import datasets

        if isinstance(self.source, datasets.Dataset):
            return self.source
        files, raw = self.files(), str(cache_dir / "raw")
        if not files:
            return self._load_named(raw)
        kinds = {_builder(file) for file in files}
        if len(kinds) > 1:
            raise UlyssesError(
                f"files of the kinds {sorted(kinds)} together",
                "files of one kind",
                "convert them, or name those of one kind with a narrower glob",
            )
        (kind,) = kinds
        # One row for each text file, instead of one for each line.
        options = {"sample_by": "document", "encoding_errors": "replace"} if kind == "text" else {}
        return datasets.load_dataset(kind, data_files=files, split="train", cache_dir=raw, **options)

    def _load_named(self, raw: str) -> Any:
        import datasets

        name = os.path.expanduser(str(self.source[0] if isinstance(self.source, (list, tuple)) else self.source))
        if os.path.isfile(os.path.join(name, "dataset_info.json")) and os.path.isfile(os.path.join(name, "state.json")):
            return datasets.load_from_disk(name)
        try:
            return datasets.load_dataset(name, self.config, split=self.split, cache_dir=raw)
        except (FileNotFoundError, ConnectionError, ValueError) as error:
            raise UlyssesError(
                f"the dataset {name!r} (configuration {self.config!r}, split {self.split!r}), which cannot be loaded: "
                f"{str(error)[:300]}",
                "a dataset on the hub or on disk with this configuration and split",
                "correct the name, the configuration or the split, or give files",
            ) from error


def _builder(file: str) -> str:
    suffixes = [suffix for suffix in Path(file).suffixes if suffix not in _COMPRESSED]
    return _BUILDERS.get(suffixes[-1].lower() if suffixes else "", "text")


def _describe_tokenizer(tokenizer: Any) -> list[str]:
    """Everything that the tokens depend on, as far as the tokenizer shows it."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if hasattr(backend, "to_str") else repr(sorted(map(str, tokenizer.get_vocab().items())))
    settings = [getattr(tokenizer, name, None) for name in ("eos_token_id", "bos_token_id", "chat_template")]
    return [type(tokenizer).__name__, rules, repr(settings)]


@dataclass(frozen=True)
class TokenCache:
    """Tokenized rows on disk, with one folder for each combination of rows, tokenizer and settings.

    Args:
        folder: Parent of these folders.
        tokenizer: A transformers tokenizer.
        text_column: See `RowEncoder`.
        append_eos: See `RowEncoder`.
        num_proc: Number of processes that tokenize.
    """

    folder: Path
    tokenizer: Any
    text_column: str = "text"
    append_eos: bool = True
    num_proc: int | None = None

    def path(self, corpus: Corpus) -> Path:
        """The cache folder of a corpus."""
        parts = [_FORMAT, corpus.identity(), *_describe_tokenizer(self.tokenizer), self.text_column, self.append_eos]
        key = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
        return self.folder / key

    def build(self, corpus: Corpus) -> Path:
        """Tokenizes a corpus unless it is cached. To be called on one process of a node.

        Raises:
            UlyssesError: If its rows cannot be read, or no row has a token.
        """
        path = self.path(corpus)
        if path.exists():
            return path
        rows = corpus.load(self.folder)
        encoder = RowEncoder(
            self.tokenizer, kind_of_rows(rows.column_names, self.text_column), self.text_column, self.append_eos
        )
        tokenized = rows.map(
            encoder,
            with_indices=True,
            remove_columns=rows.column_names,
            num_proc=self.num_proc,
            desc="tokenizing",
            features=_features(),
            # `_save` stores the result under a key of our own, so the cache of `datasets` is not used.
            new_fingerprint=path.name,
            load_from_cache_file=False,
            keep_in_memory=len(rows) < 1000,
        )
        lengths = tokenized.with_format("numpy")["length"][:]
        if not (lengths > 0).any():
            raise UlyssesError(
                f"{len(lengths)} rows without a single token", "rows with text", "check the files and text_column"
            )
        if not (lengths > 0).all():
            tokenized = tokenized.select((lengths > 0).nonzero()[0])
        _save(tokenized, path)
        return path

    def load(self, corpus: Corpus) -> Any:
        """The tokenized rows that `build` has stored.

        Raises:
            UlyssesError: If they are not on this machine.
        """
        import datasets

        path = self.path(corpus)
        if not path.exists():
            raise UlyssesError(
                f"no tokenized data in {path}",
                "data that prepare_data has tokenized on this machine",
                "put cache_dir where all nodes see it, or leave prepare_data_per_node at True",
            )
        return datasets.load_from_disk(str(path)).with_format("numpy")


def _features() -> Any:
    from datasets import Features, Sequence, Value

    return Features(
        {"input_ids": Sequence(Value("int32")), "labels": Sequence(Value("int32")), "length": Value("int64")}
    )


def _save(tokenized: Any, path: Path) -> None:
    """Writes to a temporary folder and renames it, so that a folder that exists is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = tempfile.mkdtemp(dir=path.parent, prefix=".unfinished-")
    try:
        tokenized.save_to_disk(unfinished)
        os.rename(unfinished, path)
    # Another process may have been faster. Its folder holds the same rows.
    except OSError:
        if not path.exists():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
