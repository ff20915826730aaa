"""Tokenizes rows once, and keeps them on disk under a key of everything that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_ulysses.data.corpus import Corpus
from lightning_ulysses.data.readers import Row
from lightning_ulysses.data.token_rows import CacheNote, TokenRows, TokenWriter, find_fault, read_note
from lightning_ulysses.data.tokenizer_key import describe_tokenizer
from lightning_ulysses.data.tokens import BadRows, EncodedRows, RowEncoder, kind_of_rows
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.progress import progress

# Part of every cache key. Raise it when a change of the code gives other tokens for the same rows.
_FORMAT = 3
_UNFINISHED = ".unfinished-"
# Seconds after which a folder that is not locked was left by a dead process, with a lock and without.
_YOUNG, _FORGOTTEN = 60, 86_400
# Rows that are encoded together, and characters after which they are enough.
_ROWS, _CHARACTERS = 256, 2**20
# The rows from which the kind of all rows is read where each may have columns of its own.
_FIRST_ROWS = 100


@dataclass(frozen=True)
class TokenCache:
    """Tokenized rows on disk, with one folder for each combination of rows, tokenizer and settings.

    Args:
        folder: Parent of these folders.
        tokenizer: A transformers tokenizer, or a function; see `TextEncoder`.
        text_column: See `RowEncoder`.
        append_eos: See `RowEncoder`.
        num_proc: Number of processes that tokenize.
        bad_rows: See `RowEncoder`.
    """

    folder: Path
    tokenizer: Any
    text_column: str = "text"
    append_eos: bool = True
    num_proc: int | None = None
    bad_rows: BadRows = "error"

    @cached_property
    def _description(self) -> list[str]:
        return describe_tokenizer(self.tokenizer)

    def path(self, corpus: Corpus, ask: bool = False) -> Path:
        """The cache folder of a corpus.

        Args:
            corpus: The corpus.
            ask: Whether the hub is asked what it has now. Otherwise it is what `build` was told.
        """
        settings = [self.text_column, self.append_eos, self.bad_rows]
        parts = [_FORMAT, corpus.identity(), self._revision(corpus, ask), *self._description, *settings]
        return self.folder / hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    def _revision(self, corpus: Corpus, ask: bool) -> str | None:
        """What the hub has under a name, or had when it was asked last."""
        if corpus.name is None or os.path.isdir(corpus.name):
            return None
        key = hashlib.blake2b(json.dumps(corpus.identity()).encode(), digest_size=16).hexdigest()
        note = self.folder / f"revision-{key}"
        known = note.read_text() if note.is_file() else None
        if not ask:
            return known
        try:
            revision = corpus.revision()
        except UlyssesError as error:
            if known is None:
                raise
            rank_zero_warn(f"{corpus.name!r} is taken as it was when it was loaded last. {error.got}")
            return known
        if revision != known:
            written = self.folder / f"{_UNFINISHED}{uuid.uuid4().hex}.txt"
            self.folder.mkdir(parents=True, exist_ok=True)
            written.write_text(str(revision))
            os.replace(written, note)
        return revision

    def build(self, corpus: Corpus) -> Path:
        """Tokenizes a corpus unless it is cached. To be called on one process of a node.

        Raises:
            UlyssesError: If its rows cannot be read, no row has a token, or the folder cannot be written to.
        """
        path = self.path(corpus, ask=True)
        if path.exists():
            fault = find_fault(path, sums=True)
            if fault is None:
                self._say_skipped(read_note(path))
                return path
            rank_zero_warn(f"The tokens in {path} are damaged ({fault}), and are made again.")
            self._remove(path, fault)
        with self._unfinished() as folder:
            self._write(corpus, folder)
            # Files that are still being written would give rows under a key that is not theirs.
            if self.path(corpus) != path:
                raise UlyssesError(
                    "data that changed while it was tokenized",
                    "files that stay as they are",
                    "start again once nobody writes to them",
                )
            shutil.rmtree(folder / "scratch", ignore_errors=True)
            (folder / "lock").unlink(missing_ok=True)
            try:
                os.rename(folder, path)
            # Another process may have been faster. Its folder holds the same rows.
            except OSError:
                if not path.exists():
                    raise
        self._say_skipped(read_note(path))
        return path

    def load(self, corpus: Corpus) -> TokenRows:
        """The tokenized rows that `build` has stored.

        Raises:
            UlyssesError: If they are not on this machine, or damaged.
        """
        path = self.path(corpus)
        if not path.exists():
            raise UlyssesError(
                f"no tokenized data in {path}",
                "data that prepare_data has tokenized on this machine, and that is the same on every process",
                "put cache_dir where all nodes see it, or leave prepare_data_per_node at True; and change neither the "
                "data nor the tokenizer in between",
            )
        if (fault := find_fault(path)) is not None:
            raise UlyssesError(
                f"damaged tokens in {path} ({fault})", "the tokens that prepare_data has written", "start again"
            )
        return TokenRows(path)

    def _remove(self, path: Path, fault: str) -> None:
        aside = self.folder / f"{_UNFINISHED}{uuid.uuid4().hex}"
        try:
            os.rename(path, aside)
        except OSError as error:
            raise UlyssesError(
                f"damaged tokens in {path} ({fault}), which cannot be removed ({error.strerror})",
                "a folder that this user may change",
                f"let its owner remove {path}, or set cache_dir to a folder of your own",
            ) from error
        shutil.rmtree(aside, ignore_errors=True)

    @contextmanager
    def _unfinished(self) -> Iterator[Path]:
        """A new folder for this process alone, which is gone afterwards unless it was renamed.

        Folders that dead processes have left are removed. Each lives as long as its lock is held.
        """
        folder = self.folder / f"{_UNFINISHED}{uuid.uuid4().hex}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Not tempfile.mkdtemp, whose folders no other user may read.
            folder.mkdir()
        except OSError as error:
            raise UlyssesError(
                f"cache_dir={str(self.folder)!r}, in which nothing can be written ({error.strerror})",
                "a folder for the tokens",
                "set cache_dir to a folder that this user may write to",
            ) from error
        with (folder / "lock").open("w") as lock:
            _try_lock(lock)
            for other in self.folder.glob(f"{_UNFINISHED}*"):
                if other != folder and _is_left_over(other):
                    shutil.rmtree(other, ignore_errors=True)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _write(self, corpus: Corpus, folder: Path) -> None:
        rows = corpus.rows(folder / "scratch")
        read = rows.read()
        first = list(islice(read, _FIRST_ROWS))
        columns = rows.columns or sorted({name for row in first for name in row.values or {}})
        if not columns and first:
            raise UlyssesError(
                f"rows of which the first {len(first)} cannot be read: row {first[0].where} ({first[0].error})",
                "JSON objects, one a line",
                "mend the files, or convert them",
            )
        kind = kind_of_rows(columns, self.text_column)
        encoder = RowEncoder(self.tokenizer, kind, self.text_column, self.append_eos, self.bad_rows)
        writer = TokenWriter(folder)
        try:
            with progress("Tokenizing", rows.total, "rows") as advance:
                for encoded in encode(encoder, batches(chain(first, read), self.text_column), self.num_proc):
                    writer.add(encoded)
                    advance(encoded.rows)
            self._check_any(writer.note)
            writer.finish()
        finally:
            writer.close()

    def _check_any(self, note: CacheNote) -> None:
        if not note.documents:
            bad = f", {note.skipped} of them bad ({'; '.join(note.bad)})" if note.skipped else ""
            raise UlyssesError(
                f"{note.rows} rows without a single token{bad}", "rows with text", "check the files and text_column"
            )

    def _say_skipped(self, note: CacheNote) -> None:
        if note.skipped:
            more = "" if note.skipped == len(note.bad) else "; ..."
            rank_zero_warn(f"{note.skipped} of {note.rows} rows are bad and left out: {'; '.join(note.bad)}{more}")


def batches(rows: Iterable[Row], text_column: str) -> Iterator[list[Row]]:
    """Rows in batches that are quick to encode."""
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        text = row.values.get(text_column) if row.values is not None else None
        characters += len(text) if isinstance(text, str) else 0
        if len(batch) == _ROWS or characters >= _CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encode(encoder: RowEncoder, some: Iterable[list[Row]], num_proc: int | None) -> Iterator[EncodedRows]:
    """Encodes batches of rows, in order, in this process or in ``num_proc`` others."""
    with _one_thread():
        if num_proc is None or num_proc < 2:
            yield from map(encoder.many, some)
            return
        yield from _in_processes(encoder, some, num_proc)


def _in_processes(encoder: RowEncoder, some: Iterable[list[Row]], count: int) -> Iterator[EncodedRows]:
    """Each process gets a batch, and the next one once its result is taken, so that none waits for a full pipe."""
    # As `datasets` does it: this package also sends functions that the standard library cannot.
    import multiprocess

    pairs = [multiprocess.Pipe() for _ in range(count)]
    workers = [multiprocess.Process(target=_work, args=(theirs, encoder), daemon=True) for _, theirs in pairs]
    try:
        for worker, (_, theirs) in zip(workers, pairs, strict=True):
            worker.start()
            theirs.close()
        waiting: deque[Any] = deque()
        free = deque(ours for ours, _ in pairs)
        for batch in some:
            if not free:
                yield _result(waiting[0])
                free.append(waiting.popleft())
            waiting.append(free.popleft())
            waiting[-1].send(batch)
        while waiting:
            yield _result(waiting.popleft())
    finally:
        for worker in workers:
            worker.terminate()


def _work(connection: Any, encoder: RowEncoder) -> None:
    while True:
        batch = connection.recv()
        try:
            connection.send(encoder.many(batch))
        # Raised again in the process that waits for the result.
        except Exception as error:
            connection.send(error)


def _result(connection: Any) -> EncodedRows:
    try:
        result = connection.recv()
    except EOFError as error:
        raise UlyssesError(
            "a process that ended while it tokenized",
            "processes that live as long as the rows last",
            "look for a lack of memory, and lower num_proc",
        ) from error
    if isinstance(result, Exception):
        raise result
    return result


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps tokenizers from starting threads, which a later fork of dataloader workers would not survive."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def _try_lock(file: Any) -> bool:
    """Takes the lock of a file. False if another process holds it, or nobody can."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def _is_left_over(folder: Path) -> bool:
    """Whether the process that made a folder is dead. Its lock is then free, if it came to make one."""
    try:
        age = time.time() - folder.stat().st_mtime
        if not (folder / "lock").exists():
            return age > _FORGOTTEN
        with (folder / "lock").open() as lock:
            # One that was made this moment may not be locked yet.
            return age > _YOUNG and _try_lock(lock)
    except OSError:
        return False
