"""Turns rows of text, prompts with completions, or chats into tokens and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_ulysses.data.rows import IGNORED
from lightning_ulysses.errors import UlyssesError

Kind = Literal["tokens", "chat", "completion", "text"]
Encoded = dict[str, Any]


def load_tokenizer(tokenizer: Any) -> Any:
    """Loads a tokenizer from its name or path. Any other callable is taken for a tokenizer.

    Raises:
        UlyssesError: If it is neither.
    """
    if isinstance(tokenizer, str):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(tokenizer)
    if not callable(tokenizer):
        raise UlyssesError(
            f"a tokenizer of type {type(tokenizer).__name__}",
            "the name or path of a transformers tokenizer, or the tokenizer itself",
            "set tokenizer='name', or pass AutoTokenizer.from_pretrained(...)",
        )
    return tokenizer


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


def _ids(tokenizer: Any, messages: Sequence[Mapping[str, Any]], answer_follows: bool = False) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        list(messages), tokenize=True, add_generation_prompt=answer_follows, return_dict=False
    )
    return list(ids)


def _check_messages(tokenizer: Any, messages: Any, number: int) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise UlyssesError(
            f"row {number}, a chat, for a {type(tokenizer).__name__} without a chat template",
            "a tokenizer that knows how to write chats",
            "take the tokenizer of a chat model, or set tokenizer.chat_template",
        )
    is_chat = isinstance(messages, (list, tuple)) and all(
        isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in messages
    )
    if not is_chat or not messages:
        raise UlyssesError(
            f"row {number} with the messages {str(messages)[:80]!r}",
            "a list of messages, each with 'role' and 'content'",
            "change the column, or drop the row",
        )


def _no_prefix(number: int) -> UlyssesError:
    return UlyssesError(
        f"row {number}, a chat in which the template writes an earlier turn in another way once more follow",
        "a chat template under which the beginning of a chat is the beginning of its tokens",
        "give rows of 'prompt' and 'completion' with one answer each, or a template with {% generation %} marks",
    )


def _marked(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> Encoded:
    """Labels from the template's own marks around the assistant's messages."""
    written = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = list(written["input_ids"])
    labels = [token if said else IGNORED for token, said in zip(ids, written["assistant_masks"], strict=True)]
    return {"input_ids": ids, "labels": labels}


def _chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]], number: int) -> Encoded:
    """A chat with the assistant's messages as targets."""
    _check_messages(tokenizer, messages, number)
    if "{% generation %}" in str(tokenizer.chat_template).replace("{%-", "{%").replace("-%}", "%}"):
        return _marked(tokenizer, messages)
    ids = _ids(tokenizer, messages)
    labels = [IGNORED] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # The answer is the difference of two prefixes of the chat: up to the question, and up to the answer.
        asked, answered = _ids(tokenizer, messages[:turn], True), _ids(tokenizer, messages[: turn + 1])
        if ids[: len(answered)] != answered or answered[: len(asked)] != asked:
            raise _no_prefix(number)
        labels[len(asked) : len(answered)] = ids[len(asked) : len(answered)]
    return {"input_ids": ids, "labels": labels}


@dataclass(frozen=True)
class RowEncoder:
    """Turns one row into ``input_ids``, ``labels`` and ``length``. Picklable, for worker processes.

    Args:
        tokenizer: A transformers tokenizer.
        kind: The kind of the rows.
        text_column: The column with the text.
        append_eos: Ends texts and completions with the end-of-sequence token, unless the tokenizer does so itself.
    """

    tokenizer: Any
    kind: Kind
    text_column: str = "text"
    append_eos: bool = True

    def __call__(self, row: Mapping[str, Any], number: int) -> Encoded:
        """Encodes row ``number``.

        Returns:
            ``input_ids`` and ``labels`` (S,), with -100 on tokens that are no target, and ``length``, S.

        Raises:
            UlyssesError: If the row is not of the kind that its columns indicate.
        """
        encoded: Encoded
        if self.kind == "tokens":
            ids = list(row["input_ids"])
            encoded = {"input_ids": ids, "labels": list(row["labels"]) if row.get("labels") is not None else ids}
        elif self.kind == "chat":
            encoded = _chat(self.tokenizer, row["messages"], number)
        elif self.kind == "completion":
            encoded = self._completion(row["prompt"], row["completion"], number)
        else:
            ids = self._ended(self._tokens(row[self.text_column], self.text_column, number))
            encoded = {"input_ids": ids, "labels": ids}
        return {**encoded, "length": len(encoded["input_ids"])}

    def _tokens(self, text: Any, column: str, number: int, special: bool = True) -> list[int]:
        if text is None or text == "":
            return []
        if not isinstance(text, str):
            raise UlyssesError(
                f"row {number} with {column!r} of type {type(text).__name__}",
                "text",
                "set text_column to the column that holds the text, or convert it",
            )
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _ended(self, ids: list[int]) -> list[int]:
        end = getattr(self.tokenizer, "eos_token_id", None)
        return [*ids, end] if self.append_eos and end is not None and ids and ids[-1] != end else ids

    def _completion(self, prompt: Any, completion: Any, number: int) -> Encoded:
        """Texts, joined as tokens so that no token spans prompt and completion; or lists of messages."""
        if isinstance(prompt, (list, tuple)) and isinstance(completion, (list, tuple)):
            messages = [*prompt, *completion]
            _check_messages(self.tokenizer, messages, number)
            ids, asked = _ids(self.tokenizer, messages), _ids(self.tokenizer, prompt, True)
            if ids[: len(asked)] != asked:
                raise _no_prefix(number)
        else:
            asked = self._tokens(prompt, "prompt", number)
            end = getattr(self.tokenizer, "eos_token_id", None)
            # Tokenizers such as T5's append the end token to every text, but the text goes on after the prompt.
            asked = asked[:-1] if asked and asked[-1] == end else asked
            ids = [*asked, *self._ended(self._tokens(completion, "completion", number, special=False))]
        return {"input_ids": ids, "labels": [IGNORED] * len(asked) + ids[len(asked) :]}
