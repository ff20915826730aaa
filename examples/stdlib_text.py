"""Long documents that every machine with Python has: the source of its standard library, packed into full rows."""

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import ByT5Tokenizer

from lightning_ulysses.data import SequenceDataModule

Batch = dict[str, Tensor]

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
# Files with a smaller share of letters and blanks are tables of codes.
MIN_TEXT_SHARE = 0.78


def stdlib_files() -> Iterator[Path]:
    """Yield the modules of the standard library that hold text, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            if text and sum(c.isalpha() or c.isspace() for c in text) >= MIN_TEXT_SHARE * len(text):
                yield path


def choose_files(tokens: int, seed: int) -> list[str]:
    """Choose some of these files at random.

    Args:
        tokens: About how many bytes of text to choose.
        seed: Decides which files.

    Returns:
        Paths, in order.

    Raises:
        ValueError: If the standard library has less text.
    """
    files = list(stdlib_files())
    random.Random(seed).shuffle(files)
    chosen, size = [], 0
    while size < tokens and files:
        chosen.append(files.pop())
        size += chosen[-1].stat().st_size
    if size < tokens:
        raise ValueError(f"got tokens={tokens}, the text has {size}: ask for fewer")
    return sorted(map(str, chosen))


class StdlibText(SequenceDataModule):
    """Byte tokens of the standard library's source, whole modules packed into rows of ``max_tokens``.

    Args:
        tokens: About how much text to use.
        validation: Fraction of the files to validate on.
        seed: Decides which files, and their order.
        **kwargs: Every other argument of ``SequenceDataModule``.
    """

    def __init__(self, tokens: int = 1_000_000, validation: float = 0.05, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(
            train=choose_files(tokens, seed), tokenizer=ByT5Tokenizer(), validation=validation, seed=seed, **kwargs
        )
        self.first_batch: Batch | None = None

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Keep the first training batch, which is still whole here, for a rerun in one process."""
        if self.first_batch is None and self.trainer is not None and self.trainer.training:
            self.first_batch = batch
        return batch
