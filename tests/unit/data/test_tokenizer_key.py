"""What the key of stored tokens knows of a user's own tokenizer, and rows that no tokenizer should get."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import ByT5Tokenizer

from lightning_ulysses import UlyssesError
from lightning_ulysses.data import SequenceDataModule
from lightning_ulysses.data.corpus import Corpus
from lightning_ulysses.data.token_cache import TokenCache
from lightning_ulysses.data.tokenizer import TextEncoder
from lightning_ulysses.data.tokenizer_key import describe_tokenizer

# A vocabulary that is read from elsewhere, and knows no word that the key tries.
MODULE = """
WORDS = {}
COUNT = 0


class Table:
    shared = {}

    def __init__(self):
        self.own, self.seen = {}, {}

    def __call__(self, text):
        self.seen[text] = True
        return [self.own.get(word, self.shared.get(word, 0)) for word in text.split()]


TABLE = Table()


def encode(text):
    global COUNT
    COUNT += 1
    return [WORDS.get(word, 0) for word in text.split()]


def by_helper(text):
    return encode(text) if text else []


def by_object(text):
    return TABLE(text)
"""


@dataclass(slots=True)
class Slotted:
    words: dict[str, int]

    def __call__(self, text: str) -> list[int]:
        return [self.words.get(word, 0) for word in text.split()]


@pytest.mark.parametrize("case", ["function", "helper", "object", "module", "nested", "method", "shared", "slots"])
def test_values_that_code_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    (tmp_path / "own_words.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_words", raising=False)
    own: Any = importlib.import_module("own_words")
    slotted = Slotted({})
    tokenizers: dict[str, Any] = {
        "function": own.encode,
        "helper": functools.partial(own.by_helper),
        "object": own.by_object,
        "module": lambda text: own.encode(text),
        "nested": lambda text: [number for part in [text] for number in (lambda: own.encode(part))()],
        "method": own.TABLE.__call__,
        "shared": own.TABLE,
        "slots": slotted,
    }
    tokenizer = tokenizers[case]
    before = describe_tokenizer(tokenizer)
    # Caches and counters have changed.
    tokenizer("a text")
    assert describe_tokenizer(tokenizer) == before
    changed = {"object": own.TABLE.own, "method": own.TABLE.own, "shared": own.Table.shared, "slots": slotted.words}
    changed.get(case, own.WORDS)["zyzzyva"] = 7
    assert describe_tokenizer(tokenizer) != before


def test_a_tokenizer_class_that_changes_texts() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    class Own(PreTrainedTokenizerFast):
        def __call__(self, text: Any, **settings: Any) -> Any:
            return super().__call__(text.replace("a", "b"), **settings)

    rust = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    rust.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    encoder = TextEncoder(Own(tokenizer_object=rust, unk_token="[UNK]"))
    assert encoder.many(["b", "a"]) == [[2], [2]]


def test_a_tokenizer_that_changes_between_stages(tmp_path: Path) -> None:
    words = {"one": 1}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
    data = SequenceDataModule(str(tmp_path / "rows.jsonl"), Slotted(words), 64, cache_dir=str(tmp_path / "cache"))
    for token in (1, 2):
        words["one"] = token
        data.prepare_data()
        data.setup("fit")
        assert data.documents["train"][0]["input_ids"].tolist() == [token]
    words["one"] = 3
    with pytest.raises(UlyssesError, match="no tokenized data"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("first", "other"),
    [
        ({"text": "a"}, {"messages": [{"role": "user", "content": "a"}]}),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "answer": "b"}),
        ({"input_ids": [1, 2]}, {"text": "a"}),
    ],
)
def test_rows_of_another_kind_behind_the_first_ones(tmp_path: Path, first: Any, other: Any) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, [*[first] * 120, other])))
    with pytest.raises(UlyssesError, match=r"row 120 \(line 121 .*with the columns"):
        TokenCache(tmp_path / "cache", ByT5Tokenizer()).build(Corpus(str(source)))


@pytest.mark.parametrize("content", ["text".encode("utf-16"), b"\x93NUMPY\x01\x00v\x00{'descr'"])
def test_files_that_are_no_text(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UlyssesError, match=r"row 0 .*a.txt.*no text in UTF-8"):
        TokenCache(tmp_path / "cache", ByT5Tokenizer()).build(Corpus(str(tmp_path / "a.txt")))
