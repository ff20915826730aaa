"""From files to packed batches: a LightningDataModule, also for configurations of LightningCLI."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_ulysses.cost.model import CostModel
from lightning_ulysses.data.collate import PackingCollator
from lightning_ulysses.data.corpus import Corpus
from lightning_ulysses.data.epoch_plan import PackingSettings, check_whole
from lightning_ulysses.data.packing import Overlong, random_order
from lightning_ulysses.data.sampler import SequenceShardSampler
from lightning_ulysses.data.token_cache import TokenCache
from lightning_ulysses.data.token_rows import TokenRows
from lightning_ulysses.data.tokenizer import load_tokenizer
from lightning_ulysses.data.tokens import BadRows
from lightning_ulysses.errors import UlyssesError


def _default_cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "lightning_ulysses"


class SequenceDataModule(pl.LightningDataModule):
    """Documents from files or a dataset, tokenized once, packed full, and dealt to data-parallel ranks.

    The columns tell what the rows are:

    - ``text`` (or ``text_column``): trained on whole. A text file is one row.
    - ``prompt`` and ``completion``: the loss is on the completion. Both are texts, or lists of messages.
    - ``messages``, a chat of ``{"role": ..., "content": ...}``: the loss is on the assistant's messages.
    - ``input_ids``, and optionally ``labels``: tokenized already.

    A folder is read as the files in it. Bad rows, such as a line that is no JSON or a chat that the template refuses,
    are named by their number and place.

    Tokens are stored on disk, 4 bytes each, and 4 more only where labels differ from them. Later runs with the same
    content of files, the same tokenizer and the same settings start at once. Needs the extra ``hf``.

    Args:
        train: Text, JSONL, Parquet or CSV files, folders or globs, a folder written by ``Dataset.save_to_disk``, the
            name of a dataset, or a ``datasets.Dataset``.
        tokenizer: A transformers tokenizer, or its name or path; or a function of a text that returns token ids.
        max_tokens: Most tokens of a pack, before padding.
        validation: The same as ``train``; or a fraction of its documents, between 0 and 1; or None.
        config: Configuration of the dataset, if a name is given.
        split: Split of the dataset, if ``train`` is a name or a folder.
        validation_split: Split of the dataset, if ``validation`` is a name or a folder.
        text_column: The column with the text.
        append_eos: Ends every document with the end-of-sequence token.
        overlong: How to handle documents longer than ``max_tokens``; see `SequenceShardSampler`.
        rows_per_batch: B, the number of packs in a batch.
        pad_to_multiple_of: See `PackingCollator`.
        window: See `SequenceShardSampler`.
        cost: The cost of a pack; see `CostModel`.
        seed: Seed of the packing, of the order and of the validation split.
        drop_last: Leaves out the packs of an incomplete last step.
        num_workers: Number of dataloader workers.
        num_proc: Number of processes that tokenize.
        cache_dir: Folder for the tokens. By default it lies below the user's cache folder. Several users may share one.
        bad_rows: ``"error"`` refuses data with a bad row, ``"skip"`` leaves such rows out, counts and reports them.

    Raises:
        UlyssesError: If a setting is out of range or a file is missing. In ``prepare_data``, if rows cannot be read. If
            a dataloader is asked for before ``setup``.

    Example:
        >>> data = SequenceDataModule("corpus/*.jsonl", "my/tokenizer", max_tokens=65536, validation=0.01)
    """

    def __init__(
        self,
        train: Any,
        tokenizer: Any,
        max_tokens: int = 8192,
        validation: Any = None,
        config: str | None = None,
        split: str = "train",
        validation_split: str = "validation",
        text_column: str = "text",
        append_eos: bool = True,
        overlong: Overlong = "split",
        rows_per_batch: int = 1,
        pad_to_multiple_of: int | Literal["auto"] | None = "auto",
        window: int = 64,
        cost: CostModel | None = None,
        seed: int = 0,
        drop_last: bool = False,
        num_workers: int = 0,
        num_proc: int | None = None,
        cache_dir: str | None = None,
        bad_rows: BadRows = "error",
    ) -> None:
        super().__init__()
        if bad_rows not in get_args(BadRows):
            raise UlyssesError(f"bad_rows={bad_rows!r}", f"one of {list(get_args(BadRows))}", "change bad_rows")
        self.fraction = self._fraction(validation)
        self.corpora = {"train": Corpus(train, config, split, text_column)}
        if validation is not None and self.fraction is None:
            self.corpora["validation"] = Corpus(validation, config, validation_split, text_column)
        # Raises now if a file is missing.
        for corpus in self.corpora.values():
            corpus.files()
        check_whole("rows_per_batch", rows_per_batch, 1)
        # Only checks the settings, before any file is tokenized.
        PackingSettings(max_tokens, overlong, window, CostModel() if cost is None else cost, True, seed, drop_last)
        self.max_tokens = max_tokens
        self.rows_per_batch = rows_per_batch
        self.num_workers = num_workers
        self.seed = seed
        self.collator = PackingCollator(max_tokens, pad_to_multiple_of)
        self._packing: dict[str, Any] = {"overlong": overlong, "window": window, "cost": cost, "seed": seed}
        self._drop_last = drop_last
        self._tokenizer = tokenizer
        self._settings: dict[str, Any] = {"text_column": text_column, "append_eos": append_eos, "num_proc": num_proc}
        self._settings["bad_rows"] = bad_rows
        self._folder = Path(cache_dir).expanduser() if cache_dir else _default_cache()
        self._cache: TokenCache | None = None
        self.documents: dict[str, TokenRows] = {}

    @staticmethod
    def _fraction(validation: Any) -> float | None:
        if not isinstance(validation, (int, float)) or isinstance(validation, bool):
            return None
        if not 0 < validation < 1:
            raise UlyssesError(
                f"validation={validation}",
                "a fraction of the documents between 0 and 1, files, or None",
                "set validation to a fraction such as 0.01",
            )
        return float(validation)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded on first use."""
        self._tokenizer = load_tokenizer(self._tokenizer)
        return self._tokenizer

    @property
    def cache(self) -> TokenCache:
        """The cache of tokenized rows."""
        # Kept for all data of a stage, since describing a tokenizer takes a while.
        if self._cache is None:
            self._cache = TokenCache(self._folder, self.tokenizer, **self._settings)
        return self._cache

    @override
    def prepare_data(self) -> None:
        # The tokenizer may have got other tokens since.
        self._cache = None
        for name, corpus in self.corpora.items():
            rank_zero_info(f"{name} data: {self.cache.build(corpus)}")

    @override
    def setup(self, stage: str) -> None:
        self._cache = None
        cache = self.cache
        self.documents = {name: cache.load(corpus) for name, corpus in self.corpora.items()}
        if self.fraction is not None:
            whole = self.documents["train"]
            if len(whole) < 2:
                raise UlyssesError(
                    f"validation={self.fraction} of {len(whole)} documents", "two documents or more", "give more data"
                )
            size = min(len(whole) - 1, max(1, round(self.fraction * len(whole))))
            order = random_order(len(whole), self.seed, *b"validation")
            parts = {"train": order[size:], "validation": order[:size]}
            # Sorted: neighbours on the disk stay neighbours.
            self.documents = {name: whole.select(np.sort(numbers)) for name, numbers in parts.items()}

    def _loader(self, name: str) -> DataLoader[Any]:
        if name not in self.documents:
            raise UlyssesError(
                f"a SequenceDataModule that is asked for its {name} dataloader before setup",
                "prepare_data() and setup(), which tokenize and load the documents, to come first",
                "call data.prepare_data() and data.setup('fit'), as a Trainer does",
            )
        documents = self.documents[name]
        training = name == "train"
        sampler = SequenceShardSampler(
            documents,
            documents.lengths,
            self.max_tokens,
            shuffle=training,
            drop_last=self._drop_last and training,
            **self._packing,
        )
        return DataLoader(
            sampler.packed,
            sampler=sampler,
            batch_size=None if self.rows_per_batch == 1 else self.rows_per_batch,
            collate_fn=self.collator,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train")

    @override
    def val_dataloader(self) -> Any:
        return [] if self.fraction is None and "validation" not in self.corpora else self._loader("validation")
