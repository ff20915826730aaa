"""Turns rows of text, prompts with completions, or chats into tokens and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_ulysses.data.chats import BadRow, Encoded, encode_answer, encode_chat
from lightning_ulysses.data.readers import Row
from lightning_ulysses.data.rows import IGNORED
from lightning_ulysses.data.tokenizer import TextEncoder
from lightning_ulysses.errors import UlyssesError

Kind = Literal["tokens", "chat", "completion", "text"]
BadRows = Literal["error", "skip"]
Tokens = NDArray[np.int32]


def kind_of_rows(columns: Sequence[str], text_column: str) -> Kind:
    """The kind of rows with these columns.

    Raises:
        UlyssesError: If no column can be trained on.
    """
    if "input_ids" in columns:
        return "tokens"
    if "messages" in columns:
        return "chat"
    if {"prompt", "completion"} <= set(columns):
        return "completion"
    if text_column in columns:
        return "text"
    raise UlyssesError(
        f"rows with the columns {sorted(columns)}",
        f"a column {text_column!r}, the columns 'prompt' and 'completion', 'messages', or tokens in 'input_ids'",
        "set text_column to the column that holds the text, or rename the columns",
    )


@dataclass
class EncodedRows:
    """The tokens of several rows.

    Attributes:
        tokens: (N,) the tokens of all rows, one row after the other.
        lengths: (rows,) tokens of each row that has any.
        labels: (N,), or None if all tokens are their own labels.
        rows: Rows read, those without a token and bad ones included.
        bad: What is wrong with each bad row.
    """

    tokens: Tokens
    lengths: NDArray[np.int64]
    labels: Tokens | None
    rows: int
    bad: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RowEncoder:
    """Turns rows into ``input_ids`` and ``labels``. Picklable, for worker processes.

    Args:
        tokenizer: A transformers tokenizer, or a function; see `TextEncoder`.
        kind: The kind of the rows.
        text_column: The column with the text.
        append_eos: Ends texts and completions with the end-of-sequence token, unless the tokenizer does so itself.
        bad_rows: Whether a bad row raises, or is left out and counted.
    """

    tokenizer: Any
    kind: Kind
    text_column: str = "text"
    append_eos: bool = True
    bad_rows: BadRows = "error"

    @cached_property
    def _texts(self) -> TextEncoder:
        return TextEncoder(self.tokenizer)

    @property
    def _columns(self) -> tuple[str, ...]:
        """The columns without which a row is not of this kind."""
        columns = {"tokens": ("input_ids",), "chat": ("messages",), "completion": ("prompt", "completion")}
        return columns.get(self.kind, (self.text_column,))

    @property
    def _end(self) -> int | None:
        return getattr(self.tokenizer, "eos_token_id", None)

    def __call__(self, row: Mapping[str, Any], number: int | str) -> Encoded:
        """Encodes row ``number``.

        Returns:
            ``input_ids`` and ``labels`` (S,), with -100 on tokens that are no target, and ``length``, S.

        Raises:
            BadRow: If the row is not of the kind that its columns indicate.
            UlyssesError: If the tokenizer cannot encode rows of this kind.
        """
        missing = [column for column in self._columns if column not in row]
        if missing:
            raise BadRow(
                f"row {number} with the columns {sorted(map(str, row))}",
                f"{' and '.join(map(repr, self._columns))} as in the other rows",
                "add it, even empty, or give rows of one kind",
            )
        encoded: Encoded
        if self.kind == "tokens":
            encoded = _given(row, number)
        elif self.kind == "chat":
            encoded = encode_chat(self.tokenizer, row.get("messages"), number, row.get("tools"))
        elif self.kind == "completion":
            encoded = self._completion(row, number)
        else:
            text = _text(row.get(self.text_column), self.text_column, number)
            ids = self._ended(self._texts.one(text)) if text else []
            encoded = {"input_ids": ids, "labels": ids}
        return {**encoded, "length": len(encoded["input_ids"])}

    def _ended(self, ids: list[int]) -> list[int]:
        end = self._end
        return [*ids, end] if self.append_eos and end is not None and ids and ids[-1] != end else ids

    def _completion(self, row: Mapping[str, Any], number: int | str) -> Encoded:
        """Texts, joined as tokens so that no token spans prompt and completion; or lists of messages."""
        prompt, completion = row["prompt"], row["completion"]
        columns = {"prompt": prompt, "completion": completion}
        chats = [name for name, value in columns.items() if isinstance(value, (list, tuple))]
        if len(chats) == 2:
            return encode_answer(self.tokenizer, prompt, completion, number, row.get("tools"))
        if chats:
            (other,) = columns.keys() - set(chats)
            raise BadRow(
                f"row {number} with messages as {chats[0]!r} and a {type(columns[other]).__name__} as {other!r}",
                "texts in both columns, or messages in both",
                "write the prompt as [{'role': 'user', 'content': ...}] and the completion as "
                "[{'role': 'assistant', 'content': ...}], or both as texts",
            )
        asked = self._tokens(prompt, "prompt", number)
        # Tokenizers such as T5's append the end token to every text, but the text goes on after the prompt.
        asked = asked[:-1] if asked and asked[-1] == self._end else asked
        ids = [*asked, *self._ended(self._tokens(completion, "completion", number, special=False))]
        return {"input_ids": ids, "labels": [IGNORED] * len(asked) + ids[len(asked) :]}

    def _tokens(self, value: Any, column: str, number: int | str, special: bool = True) -> list[int]:
        text = _text(value, column, number)
        return self._texts.one(text, special) if text else []

    def many(self, rows: Sequence[Row]) -> EncodedRows:
        """Encodes several rows. Rows without a token are left out.

        Raises:
            BadRow: For the first bad row, unless they are skipped.
            UlyssesError: If the tokenizer cannot encode rows of this kind.
        """
        bad: list[str] = []
        encoded = self._all_texts(rows) if self.kind == "text" else None
        if encoded is None:
            encoded = [one for row in rows if (one := self._one(row, bad)) is not None]
        encoded = [pair for pair in encoded if pair[0].size]
        lengths = np.array([tokens.size for tokens, _ in encoded], dtype=np.int64)
        tokens = np.concatenate([tokens for tokens, _ in encoded] or [np.empty(0, np.int32)])
        labels = None
        if any(own is not None for _, own in encoded):
            labels = np.concatenate([tokens if own is None else own for tokens, own in encoded])
        return EncodedRows(tokens, lengths, labels, len(rows), bad)

    def _all_texts(self, rows: Sequence[Row]) -> list[tuple[Tokens, Tokens | None]] | None:
        """Texts, all at once. None if one of them has to be looked at by itself."""
        texts: list[Any] = [0 if row.values is None else row.values.get(self.text_column, 0) for row in rows]
        if not all(text is None or isinstance(text, str) for text in texts):
            return None
        try:
            found = self._texts.many([text for text in texts if text])
            return [(np.array(self._ended(ids), dtype=np.int32), None) for ids in found]
        # One by one, the row is found.
        except Exception:
            return None

    def _one(self, row: Row, bad: list[str]) -> tuple[Tokens, Tokens | None] | None:
        try:
            if row.values is None:
                raise BadRow(
                    f"row {row.where} that cannot be read ({row.error})",
                    "text in UTF-8, or a JSON object",
                    "mend the file",
                )
            try:
                encoded = self(row.values, row.where)
                tokens = np.array(encoded["input_ids"], dtype=np.int32)
                labels = np.array(encoded["labels"], dtype=np.int32)
            except UlyssesError:
                raise
            except Exception as error:
                raise BadRow(
                    f"row {row.where}, on which the tokenizer fails ({type(error).__name__}: {str(error)[:200]})",
                    "a row that it can encode",
                    "change the row or the tokenizer, or drop the row",
                ) from error
        except BadRow as error:
            if self.bad_rows == "error":
                # Where the row was refused is no matter of the rows that follow it.
                raise BadRow(error.got, error.expected, f"{error.fix}; bad_rows='skip' leaves such rows out") from error
            bad.append(error.got)
            return None
        return tokens, None if np.array_equal(tokens, labels) else labels


def _text(value: Any, column: str, number: int | str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(
            f"row {number} with {column!r} of type {type(value).__name__}",
            "text",
            "set text_column to the column that holds the text, or convert it",
        )
    return value


def _given(row: Mapping[str, Any], number: int | str) -> Encoded:
    """Tokens that are there already, and their labels if there are any."""
    fields = {"input_ids": row.get("input_ids"), "labels": row.get("labels")}
    fields["labels"] = fields["input_ids"] if fields["labels"] is None else fields["labels"]
    arrays = {key: np.asarray([] if value is None else value) for key, value in fields.items()}
    lengths = {key: array.size for key, array in arrays.items()}
    if (
        any(array.ndim != 1 or (array.size and array.dtype.kind not in "iu") for array in arrays.values())
        or len(set(lengths.values())) > 1
    ):
        raise BadRow(
            f"row {number} with {' and '.join(f'{key} of shape {a.shape} and {a.dtype}' for key, a in arrays.items())}",
            "one integer for each token in both",
            "change the row, or drop it",
        )
    for key, array in arrays.items():
        if array.size and (int(array.max()) >= 2**31 or int(array.min()) < (-(2**31) if key == "labels" else 0)):
            raise BadRow(
                f"row {number} with {key} from {array.min()} to {array.max()}",
                "tokens from 0 to 2**31 - 1",
                "drop the row",
            )
    return {key: array.tolist() for key, array in arrays.items()}
