"""Turns chats into tokens, with the assistant's messages as targets."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_ulysses.data.rows import IGNORED
from lightning_ulysses.errors import UlyssesError

Message = Mapping[str, Any]
Encoded = dict[str, Any]


class BadRow(UlyssesError):
    """A row that is not of the kind that its columns indicate."""


def check_template(tokenizer: Any, number: int | str) -> None:
    """Raises `UlyssesError` for a tokenizer that does not know how to write chats."""
    if not callable(getattr(tokenizer, "apply_chat_template", None)) or not getattr(tokenizer, "chat_template", None):
        raise UlyssesError(
            f"row {number}, a chat, for a {type(tokenizer).__name__} without a chat template",
            "a tokenizer that knows how to write chats",
            "take the tokenizer of a chat model, or set tokenizer.chat_template",
        )


def read_messages(messages: Any, number: int | str, column: str = "messages", least: int = 1) -> list[dict[str, Any]]:
    """The messages of a row, checked.

    Keys without a value are dropped: tables add them to every message, and templates ask whether a key is there.

    Raises:
        BadRow: If they are no list of messages, too few, or a message has neither content nor tool calls.
    """
    is_chat = isinstance(messages, (list, tuple)) and all(isinstance(m, Mapping) and "role" in m for m in messages)
    if not is_chat or len(messages) < least:
        raise BadRow(
            f"row {number} with the {column} {str(messages)[:80]!r}",
            "a list of messages, each with 'role' and 'content'",
            "change the column, or drop the row",
        )
    found = []
    for turn, message in enumerate(messages):
        kept = {key: value for key, value in message.items() if value is not None}
        if "content" not in kept and not kept.get("tool_calls"):
            raise BadRow(
                f"row {number} with the {column} {str(messages)[:80]!r}, of which message {turn} has neither 'content' "
                "nor tool calls",
                "a list of messages, each with 'role' and 'content'",
                "change the column, or drop the row",
            )
        found.append({**kept, "content": kept.get("content")})
    return found


def _without_nothing(value: Any) -> Any:
    """A nested value without keys that have none, which tables add."""
    if isinstance(value, Mapping):
        return {key: _without_nothing(each) for key, each in value.items() if each is not None}
    return [_without_nothing(each) for each in value] if isinstance(value, (list, tuple)) else value


def read_tools(tools: Any, number: int | str) -> list[dict[str, Any]] | None:
    """The functions that an assistant may call: JSON schemas, or their text. None without any.

    Raises:
        BadRow: If they are neither.
    """
    if not tools:
        return None
    try:
        # In a text, a key without a value is meant; in a table it is another row's.
        found = json.loads(tools) if isinstance(tools, str) else _without_nothing(tools)
    except ValueError:
        found = None
    if not isinstance(found, (list, tuple)) or not all(isinstance(each, Mapping) for each in found):
        raise BadRow(
            f"row {number} with the tools {str(tools)[:80]!r}",
            "a list of JSON schemas of functions, or the text of such a list",
            "change the column, or drop the row",
        )
    return [*found]


class ChatWriter:
    """Writes the messages of one row with a tokenizer's chat template.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: What `read_messages` returned.
        number: The row, for messages.
        tools: What `read_tools` returned.

    Raises:
        BadRow: If the template refuses the chat.
    """

    def __init__(
        self,
        tokenizer: Any,
        messages: Sequence[Message],
        number: int | str,
        tools: list[dict[str, Any]] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.number = number
        # Left out where there are none, since a template may ask whether the argument is there.
        self._tools = {} if tools is None else {"tools": tools}
        self.messages = self._with_content(list(messages))

    def _with_content(self, messages: list[Message]) -> list[Message]:
        """Messages of tool calls alone, with the content that the template can write: none, or an empty text."""
        if all(message["content"] is not None for message in messages):
            return messages
        empty = [{**message, "content": ""} if message["content"] is None else message for message in messages]
        try:
            text = self._write(messages)
        except BadRow:
            return empty
        # A template that puts content down unseen writes the word None.
        return empty if text.count("None") > self._write(empty).count("None") else messages

    def _apply(self, messages: Sequence[Message], **settings: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(list(messages), **self._tools, **settings)
        except Exception as error:
            raise BadRow(
                f"row {self.number}, a chat that the template refuses ({type(error).__name__}: {str(error)[:200]})",
                "messages with the roles and the order that the template knows",
                "change the row, or drop it; or give a chat template that knows such chats",
            ) from error

    def _write(self, messages: Sequence[Message]) -> str:
        return str(self._apply(messages, tokenize=False))

    def ids(self, messages: Sequence[Message], answer_follows: bool = False) -> list[int]:
        """The tokens of some messages; with ``answer_follows`` up to where the assistant begins to speak."""
        return list(self._apply(messages, tokenize=True, add_generation_prompt=answer_follows, return_dict=False))

    def before(self, turn: int) -> list[int]:
        """The tokens in front of what message ``turn`` says."""
        if turn:
            try:
                return self.ids(self.messages[:turn], True)
            except BadRow:
                # Such as for messages whose order is right only with the answer.
                pass
        # No message comes before it: what stays the same whatever the message says.
        answered = self.ids(self.messages[: turn + 1])
        same = len(answered)
        for other in ("0", "\u03a9", "zz"):
            changed = {**self.messages[turn], "content": other}
            changed.pop("tool_calls", None)
            ids = self.ids([*self.messages[:turn], changed])
            pairs = zip(ids[:same], answered[:same], strict=False)
            same = next((place for place, (left, right) in enumerate(pairs) if left != right), min(same, len(ids)))
        return answered[:same]

    def no_prefix(self) -> BadRow:
        """The error for a template that writes the beginning of a chat in another way once more follows."""
        return BadRow(
            f"row {self.number}, a chat in which the template writes an earlier turn in another way once more follow",
            "a chat template under which the beginning of a chat is the beginning of its tokens",
            "give rows of 'prompt' and 'completion' with one answer each, or a template with {% generation %} marks",
        )


def encode_chat(tokenizer: Any, row: Any, number: int | str, tools: Any = None) -> Encoded:
    """A chat with the assistant's messages as targets.

    Args:
        tokenizer: A tokenizer with a chat template.
        row: The messages.
        number: The row, for messages.
        tools: See `read_tools`.

    Raises:
        BadRow: If the row is no chat, or the template cannot write it.
        UlyssesError: For a tokenizer without a chat template.
    """
    check_template(tokenizer, number)
    functions = read_tools(tools, number)
    writer = ChatWriter(tokenizer, read_messages(row, number), number, functions)
    if _has_marks(tokenizer.chat_template, functions is not None):
        return _marked(writer)
    ids = writer.ids(writer.messages)
    labels = [IGNORED] * len(ids)
    for turn, message in enumerate(writer.messages):
        if message["role"] != "assistant":
            continue
        # The answer is the difference of two prefixes of the chat: up to the question, and up to the answer.
        asked, answered = writer.before(turn), writer.ids(writer.messages[: turn + 1])
        if ids[: len(answered)] != answered or answered[: len(asked)] != asked:
            raise writer.no_prefix()
        labels[len(asked) : len(answered)] = ids[len(asked) : len(answered)]
    return {"input_ids": ids, "labels": labels}


def _has_marks(template: Any, has_tools: bool = False) -> bool:
    """Whether a chat template marks what the assistant says.

    Of several, the default one writes the rows, or one that is named for tools writes those with tools.
    """
    text = template
    if isinstance(template, Mapping):
        text = template["tool_use"] if has_tools and "tool_use" in template else template.get("default")
    # Without what is commented out.
    return re.search(r"{%[-+]?\s*generation\s*[-+]?%}", re.sub(r"{#.*?#}", "", str(text), flags=re.DOTALL)) is not None


def _marked(writer: ChatWriter) -> Encoded:
    """Labels from the template's own marks around the assistant's messages."""
    written = writer._apply(writer.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids = list(written["input_ids"])
    labels = [token if said else IGNORED for token, said in zip(ids, written["assistant_masks"], strict=True)]
    return {"input_ids": ids, "labels": labels}


def encode_answer(tokenizer: Any, prompt: Any, completion: Any, number: int | str, tools: Any = None) -> Encoded:
    """Messages of a prompt, and the messages of a completion as targets. The prompt may be empty.

    Args:
        tokenizer: A tokenizer with a chat template.
        prompt: The messages before.
        completion: The messages that are targets.
        number: The row, for messages.
        tools: See `read_tools`.

    Raises:
        BadRow: If either is no list of messages, or the template cannot write them.
        UlyssesError: For a tokenizer without a chat template.
    """
    check_template(tokenizer, number)
    asked = read_messages(prompt, number, "prompt", least=0)
    answered = read_messages(completion, number, "completion")
    writer = ChatWriter(tokenizer, [*asked, *answered], number, read_tools(tools, number))
    ids, before = writer.ids(writer.messages), writer.before(len(asked))
    if ids[: len(before)] != before:
        raise writer.no_prefix()
    return {"input_ids": ids, "labels": [IGNORED] * len(before) + ids[len(before) :]}
