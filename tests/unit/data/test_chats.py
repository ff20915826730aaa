"""Chats that begin with the assistant, call tools or have no prompt, and those that are refused by their number."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import ByT5Tokenizer

from lightning_ulysses import UlyssesError
from lightning_ulysses.data.chats import _has_marks
from lightning_ulysses.data.tokens import Kind, RowEncoder

byt5 = ByT5Tokenizer()
PLAIN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ m.tool_calls }}|{% endfor %}"
SUM = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '|' }}{% endfor %}"
CAREFUL = "{% for m in messages %}<{{ m.role }}>{% if m.content %}{{ m.content }}{% else %}-{% endif %}|{% endfor %}"
TURNS = (
    "{% if messages[0].role != 'system' %}<system>default|{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' and loop.first %}{{ raise_exception('who asked?') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}|{% endfor %}"
)
STRICT = "{% if messages[0].role == 'user' %}{{ raise_exception('no user') }}{% endif %}" + PLAIN
QUESTION, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
CALLS = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}


def chat(template: str, ends: str = "{% if add_generation_prompt %}<assistant>{% endif %}") -> Any:
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = template + ends
    return tokenizer


def encode(template: str, row: dict[str, Any], kind: Kind = "chat") -> tuple[str, str]:
    """The whole text, and that of the targets."""
    encoded = RowEncoder(chat(template), kind)(row, 7)
    kept = [token for token in encoded["labels"] if token != -100]
    assert len(encoded["labels"]) == len(encoded["input_ids"])
    return str(byt5.decode(encoded["input_ids"])), str(byt5.decode(kept))


@pytest.mark.parametrize("template", [SUM, PLAIN])
def test_a_first_turn_of_the_assistant(template: str) -> None:
    for answer in ("yes", "0 zebras", "Ω", ""):
        first = {"role": "assistant", "content": answer}
        whole, said = encode(template, {"messages": [first, QUESTION, ANSWER]})
        assert whole == f"<assistant>{answer}|<user>hi|<assistant>yes|"
        assert said == f"{answer}|yes|"
    # After a system message, the question is the system's.
    system = {"role": "system", "content": "be"}
    assert encode(template, {"messages": [system, ANSWER]})[1] == "yes|"


@pytest.mark.parametrize("template", [SUM, PLAIN])
def test_an_empty_prompt(template: str) -> None:
    row: dict[str, Any] = {"prompt": [], "completion": [ANSWER]}
    assert encode(template, row, "completion") == ("<assistant>yes|", "yes|")
    for prompt in ("", None):
        row = {"prompt": prompt, "completion": "yes"}
        assert encode(template, row, "completion") == ("yes</s>", "yes</s>")


@pytest.mark.parametrize(
    ("template", "written"), [(SUM, "<assistant>|"), (PLAIN, "<assistant>[{'name': 'f'}]|"), (CAREFUL, "<assistant>-|")]
)
def test_tool_calls_without_content(template: str, written: str) -> None:
    whole, said = encode(template, {"messages": [QUESTION, CALLS]})
    assert whole == f"<user>hi|{written}" and said == written.removeprefix("<assistant>")
    # Tables give every message every key, and a JSON line may leave the content out.
    calls = {key: value for key, value in CALLS.items() if key != "content"}
    assert encode(template, {"messages": [{**QUESTION, "tool_calls": None}, calls]}) == (whole, said)


SCHEMA = {"type": "function", "function": {"name": "f", "strict": None}}
WITH_TOOLS = "{% if tools is defined and tools %}[{{ tools[0].function }}]{% endif %}" + PLAIN


@pytest.mark.parametrize("tools", [[SCHEMA], (SCHEMA,), json.dumps([SCHEMA])])
def test_tools_of_a_row(tools: Any) -> None:
    for row, kind in (
        ({"messages": [QUESTION, CALLS], "tools": tools}, "chat"),
        ({"prompt": [QUESTION], "completion": [CALLS], "tools": tools}, "completion"),
    ):
        whole, said = encode(WITH_TOOLS, row, kind)  # type: ignore[arg-type]
        # Keys without a value come from tables; those of a text are the schema's.
        written = "{'name': 'f', 'strict': None}" if isinstance(tools, str) else "{'name': 'f'}"
        assert whole == f"[{written}]" + "<user>hi|<assistant>[{'name': 'f'}]|" and said == "[{'name': 'f'}]|"


@pytest.mark.parametrize("tools", [None, [], ""])
def test_rows_without_tools(tools: Any) -> None:
    assert encode(WITH_TOOLS, {"messages": [QUESTION, ANSWER], "tools": tools})[0] == "<user>hi|<assistant>yes|"


@pytest.mark.parametrize("tools", ["f", ["f"], {"name": "f"}, 3])
def test_tools_that_are_none(tools: Any) -> None:
    with pytest.raises(UlyssesError, match="row 7 with the tools"):
        encode(WITH_TOOLS, {"messages": [QUESTION, ANSWER], "tools": tools})


def test_a_template_for_tools() -> None:
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = {"default": MARKED, "tool_use": WITH_TOOLS}
    encoded = RowEncoder(tokenizer, "chat")({"messages": [QUESTION, ANSWER], "tools": [SCHEMA]}, 0)
    assert str(byt5.decode(encoded["input_ids"])).startswith("[{'name'")
    assert byt5.decode([token for token in encoded["labels"] if token != -100]) == "<assistant>yes|"


MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{%-  generation +%}{{ m.content }}|"
    "{% endgeneration %}{% else %}{{ m.content }}|{% endif %}{% endfor %}"
)


def test_marks_of_the_template() -> None:
    assert _has_marks(MARKED) and _has_marks({"default": MARKED, "tool_use": PLAIN})
    # Marks of a template that writes no row, or that are no code.
    for template in (PLAIN, "{# no {% generation %}\n#}" + PLAIN, {"default": PLAIN, "tool_use": MARKED}):
        assert not _has_marks(template)
    commented = "{# no {% generation %} #}" + PLAIN
    assert encode(commented, {"messages": [QUESTION, ANSWER]})[1] == "yes|"


BAD: dict[str, tuple[str, Kind, dict[str, Any], tuple[str, ...]]] = {
    "no content": (
        SUM,
        "chat",
        {"messages": [QUESTION, {"role": "assistant", "content": None}]},
        ("message 1 has neither",),
    ),
    "nothing": (SUM, "chat", {"messages": None}, ("with the messages 'None'",)),
    "empty": (SUM, "chat", {"messages": []}, ("with the messages '[]'",)),
    "no role": (SUM, "chat", {"messages": [{"content": "a"}]}, ("'role' and 'content'",)),
    "refused": (STRICT, "chat", {"messages": [QUESTION]}, ("the template refuses (TemplateError: no user)",)),
    "assistant refused": (TURNS, "chat", {"messages": [ANSWER]}, ("who asked?",)),
    "text after messages": (
        SUM,
        "completion",
        {"prompt": [QUESTION], "completion": "yes"},
        ("messages as 'prompt' and a str as 'completion'", "'assistant'"),
    ),
    "messages after text": (
        SUM,
        "completion",
        {"prompt": "hi", "completion": [ANSWER]},
        ("messages as 'completion' and a str as 'prompt'", "'user'"),
    ),
    "no completion": (SUM, "completion", {"prompt": [QUESTION], "completion": []}, ("with the completion '[]'",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_chats_are_named(case: str) -> None:
    template, kind, row, parts = BAD[case]
    with pytest.raises(UlyssesError, match="row 7") as caught:
        RowEncoder(chat(template), kind)(row, 7)
    assert [part for part in parts if part not in str(caught.value)] == [], caught.value
