"""Joins packs of documents into rows of tokens, and marks where each document begins and ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ulysses.data.rows import IGNORED, LABELS, is_document, read_row
from lightning_ulysses.errors import UlyssesError

# Attention kernels work on blocks of 64 to 128 tokens, and matrix products on tiles of 128 rows. A partly filled last
# block costs as much as a full one. With a multiple of 128, each of 2, 4 or 8 ranks gets a multiple of 16 tokens, as
# tensor cores want it in every precision. This costs 64 tokens per row on average: under 1 % from 8k tokens on.
AUTO_MULTIPLE = 128


class PackingCollator:
    """Joins the documents of a pack into one row, and several packs into a batch of rows.

    A document is a mapping with ``input_ids``, or just the tokens. It may also have ``labels`` (with -100 on the
    prompt), ``loss_mask``, and any other field with one entry per token. Fields are lists, arrays or tensors. Text and
    other metadata are dropped. So is padding that the document's own ``attention_mask`` marks. Documents without labels
    are trained on whole. If the targets are shifted already, pass them as ``shift_labels``. They and a ``loss_mask``
    passed with them stay unchanged.

    The batch has these keys. S is the longest pack, rounded up.

    - ``input_ids`` (B, S).
    - ``labels`` (B, S): -100 also on the first token of every document, since no token of its document predicts it. So
      no target crosses into another document, however a model shifts the labels.
    - ``shift_labels`` (B, S): the label of the next token, and -100 at the end of every document.
    - ``position_ids`` (B, S): restart at 0 in every document.
    - ``cu_seqlens`` (documents + 1,) int32, only with B = 1: cumulative lengths from 0 to S. With several rows, only
      ``position_ids`` tell the documents apart.
    - ``loss_mask`` and ``shift_loss_mask`` (B, S), if documents have ``loss_mask``. It belongs to ``labels``: where it
      is 0, the label is -100. So a model that does not know the mask respects it.
    - Every other field, (B, S, ...), 0 on padding. The strategy cannot know whether such a tensor is cut with the
      sequence, and asks for ``sequence_dims={"name": 1}``.

    Padding is a document of its own, at the end of the row and of ``cu_seqlens``. No real token attends to it, and its
    labels are -100. Nothing is ever truncated.

    Args:
        max_tokens: Most tokens of a pack, before padding. Longer packs are refused. None allows any length.
        pad_to_multiple_of: Rounds S up to a multiple of this number. ``"auto"`` stands for 128, a block of the kernels.
            None does not round.
        pad_token_id: The token of the padding. Any id of the vocabulary will do, since nothing depends on it.

    Raises:
        UlyssesError: If a setting is not positive.

    Example:
        >>> loader = DataLoader(documents, batch_sampler=packs, collate_fn=PackingCollator())
    """

    def __init__(
        self,
        max_tokens: int | None = None,
        pad_to_multiple_of: int | Literal["auto"] | None = "auto",
        pad_token_id: int = 0,
    ) -> None:
        multiple = (
            AUTO_MULTIPLE if pad_to_multiple_of == "auto" else 1 if pad_to_multiple_of is None else pad_to_multiple_of
        )
        for name, value in (("pad_to_multiple_of", multiple), ("max_tokens", 1 if max_tokens is None else max_tokens)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UlyssesError(f"{name}={value!r}", "a positive whole number", f"change {name}, or leave it out")
        self.max_tokens = max_tokens
        self.multiple = multiple
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Collates one pack (a list of rows) or several packs (a list of lists of rows).

        Returns:
            The batch: (1, S) for one pack, (B, S) for B of them.

        Raises:
            UlyssesError: If there is no row, or a mapping of columns instead of rows. If a row cannot be read, rows
                differ in their fields, or a pack is too long.
        """
        if isinstance(rows, Mapping):
            raise UlyssesError(
                f"a mapping with {sorted(map(str, rows))} in place of rows, as a Hugging Face dataset answers a pack",
                "a list of rows, or a list of packs of them",
                "give the DataLoader sampler.packed as its dataset, in place of the documents",
            )
        packs = [rows] if len(rows) == 0 or is_document(rows[0]) else list(rows)
        if not all(len(pack) for pack in packs):
            raise UlyssesError(
                "a pack without documents", "at least one document in each", "check the sampler, or the rows it filters"
            )
        documents = [[read_row(row) for row in pack] for pack in packs]
        lengths = [[len(document["input_ids"]) for document in pack] for pack in documents]
        self._check(documents, lengths)
        longest = max(map(sum, lengths))
        seq_len = longest + -longest % self.multiple
        joined = [self._join(*pack, seq_len) for pack in zip(documents, lengths, strict=True)]
        # B times (S, ...) -> (B, S, ...)
        batch = {key: torch.stack([row[key] for row in joined]) for key in joined[0]}
        if len(packs) == 1:
            edges = [0, *lengths[0], *([seq_len - longest] if seq_len > longest else [])]
            batch["cu_seqlens"] = torch.tensor(edges).cumsum(0).int()
        return batch

    def _check(self, packs: list[list[dict[str, Tensor]]], lengths: list[list[int]]) -> None:
        names = {tuple(sorted(document)) for pack in packs for document in pack}
        if len(names) > 1:
            raise UlyssesError(
                f"rows of one batch with different fields: {' and '.join(map(str, sorted(names)[:2]))}",
                "the same per-token fields in every row",
                "add the missing column to all rows of the dataset, or drop it",
            )
        total = max(map(sum, lengths))
        if self.max_tokens is not None and total > self.max_tokens:
            raise UlyssesError(
                f"a pack of {total} tokens in {len(max(lengths, key=sum))} documents with max_tokens={self.max_tokens}",
                f"at most {self.max_tokens} tokens in a pack; the collator never truncates",
                "give the sampler the same max_tokens and the lengths of the tokenized documents",
            )

    def _join(self, documents: list[dict[str, Tensor]], lengths: list[int], seq_len: int) -> dict[str, Tensor]:
        """Joins the documents of one pack into fields (S, ...)."""
        total = sum(lengths)
        fills = dict.fromkeys(LABELS, IGNORED) | {"input_ids": self.pad_token_id}
        row: dict[str, Tensor] = {}
        for key in documents[0]:
            # S_1, S_2, ... tokens -> (S, ...)
            parts = [document[key] for document in documents]
            padding = parts[0].new_full((seq_len - total, *parts[0].shape[1:]), fills.get(key, 0))
            row[key] = torch.cat([*parts, padding])
        counts = torch.tensor([*lengths, seq_len - total])
        begins = counts.cumsum(0) - counts
        if "shift_labels" not in row:
            _shift_targets(row, begins[:-1])
        row["position_ids"] = torch.arange(seq_len) - begins.repeat_interleave(counts)
        return row


def _shift_targets(row: dict[str, Tensor], begins: Tensor) -> None:
    """Adds the next token's label and mask. A document's first token is no target, so none crosses a boundary."""
    labels, mask = row["labels"], row.get("loss_mask")
    labels[begins] = IGNORED
    if mask is not None:
        mask[begins] = 0
        labels[mask == 0] = IGNORED
        row["shift_loss_mask"] = torch.cat([mask[1:], mask.new_zeros(1)])
    row["shift_labels"] = torch.cat([labels[1:], labels.new_full((1,), IGNORED)])
