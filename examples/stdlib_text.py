"""Rows of byte tokens from real long documents: the source of the Python standard library."""

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import ByT5Tokenizer

Batch = dict[str, Tensor]

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
# Windows with fewer letters and blanks than this are tables of codes.
MIN_TEXT_SHARE = 0.78


def stdlib_documents() -> Iterator[str]:
    """Yield the source of every module of the standard library, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="replace")


def _windows(document: str, length: int) -> Iterator[str]:
    for start in range(0, len(document) - length + 1, length):
        window = document[start : start + length]
        if sum(c.isalpha() or c.isspace() for c in window) >= MIN_TEXT_SHARE * length:
            yield window


def document_rows(seq_len: int, rows: int, seed: int) -> Tensor:
    """Cut long documents into rows of byte tokens.

    Each row lies within one document: documents shorter than a row are left out, and so is what remains of a document
    after its last whole row.

    Args:
        seq_len: Length S of a row.
        rows: How many rows to return.
        seed: Decides which rows, and their order.

    Returns:
        Token ids, ``(rows, S)``.

    Raises:
        ValueError: If the standard library has fewer rows.
    """
    windows = [window for document in stdlib_documents() for window in _windows(document, seq_len)]
    if len(windows) < rows:
        raise ValueError(
            f"got {rows} rows of {seq_len} tokens, the text has {len(windows)}: ask for fewer or shorter ones"
        )
    tokenizer = ByT5Tokenizer()
    chosen = random.Random(seed).sample(windows, rows)
    # A character is one byte or more, so a window of S characters has at least S tokens.
    return torch.tensor([tokenizer(window, add_special_tokens=False).input_ids[:seq_len] for window in chosen])


class RowDataset(Dataset[Batch]):
    """One row an item: ``input_ids``, and the same tokens as ``labels``; a causal model shifts them itself."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class StdlibText(pl.LightningDataModule):
    """Source text of the Python standard library in rows of ``seq_len`` byte tokens.

    Args:
        seq_len: Length S of a row.
        train_rows: Rows to train on.
        val_rows: Rows to validate on.
        batch_size: Rows per batch, B.
        seed: Decides which rows, and their order.
    """

    def __init__(
        self, seq_len: int = 8192, train_rows: int = 96, val_rows: int = 4, batch_size: int = 1, seed: int = 0
    ) -> None:
        super().__init__()
        self.seq_len = seq_len
        self.train_rows = train_rows
        self.val_rows = val_rows
        self.batch_size = batch_size
        self.seed = seed
        self.first_batch: Batch | None = None

    def setup(self, stage: str) -> None:
        """Read and tokenize the text."""
        rows = document_rows(self.seq_len, self.train_rows + self.val_rows, self.seed)
        self.train_set = RowDataset(rows[: self.train_rows])
        self.val_set = RowDataset(rows[self.train_rows :])

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the training rows."""
        return DataLoader(self.train_set, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation rows."""
        return DataLoader(self.val_set, batch_size=self.batch_size)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Keep the first training batch, still whole here, for whoever wants to rerun it."""
        if self.first_batch is None and self.trainer is not None and self.trainer.training:
            self.first_batch = batch
        return batch
