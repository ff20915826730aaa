"""Files to packed batches: what becomes a target, what is kept on disk, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import ByT5Tokenizer

from lightning_ulysses import UlyssesError
from lightning_ulysses.data import SequenceDataModule
from lightning_ulysses.data.corpus import Corpus
from lightning_ulysses.data.token_cache import TokenCache
from lightning_ulysses.data.tokens import RowEncoder, kind_of_rows

TEXTS = ["a first document", "b", "", "the third, which is the longest of the four documents", "fourth"]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}<{{ m['role'] }}>{{ m['content'] }}{% endif %}"
    "{% endfor %}"
)
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "so"},
    {"role": "assistant", "content": "no"},
]
byt5 = ByT5Tokenizer()


def said(encoded: dict[str, Any]) -> str:
    """The text of the targets."""
    return str(byt5.decode([token for token in encoded["labels"] if token != -100]))


def whole(encoded: dict[str, Any]) -> str:
    return str(byt5.decode(encoded["input_ids"]))


def chat_tokenizer(template: str | None) -> Any:
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def write(folder: Path, kind: str) -> str:
    if kind == "txt":
        for number, text in enumerate(TEXTS):
            (folder / f"{number}.txt").write_text(text)
        return str(folder / "*.txt")
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text, "other": 1}) + "\n" for text in TEXTS))
    else:
        Dataset.from_dict({"text": TEXTS}).to_parquet(str(path))
    return str(path)


def module(folder: Path, train: Any, **settings: Any) -> SequenceDataModule:
    data = SequenceDataModule(train, byt5, **{"max_tokens": 64, "cache_dir": str(folder / "cache"), **settings})
    data.prepare_data()
    data.setup("fit")
    return data


def documents(loader: Any) -> list[str]:
    found = []
    for batch in loader:
        edges = batch["cu_seqlens"].tolist()
        for begin, end in pairwise(edges):
            if (batch["position_ids"][0, begin:end] == torch.arange(end - begin)).all():
                found.append(str(byt5.decode(batch["input_ids"][0, begin:end], skip_special_tokens=True)))
    return sorted(text for text in found if text)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_every_document_of_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    data = module(tmp_path, write(tmp_path, kind))
    assert documents(data.train_dataloader()) == sorted(filter(None, TEXTS))
    assert data.val_dataloader() == []


def test_a_folder_a_dataset_and_tokens(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7], [8]], "labels": [[-100, 6, 7], [8]]})
    rows.save_to_disk(str(tmp_path / "saved"))
    for source in (rows, str(tmp_path / "saved")):
        (batch,) = module(tmp_path, source, pad_to_multiple_of=None).train_dataloader()
        assert Counter(batch["input_ids"][0].tolist()) == Counter([5, 6, 7, 8])
        assert Counter(batch["labels"][0].tolist()) == Counter([-100, 6, 7, -100])


def test_rows_and_long_documents(tmp_path: Path) -> None:
    data = module(tmp_path, write(tmp_path, "jsonl"), max_tokens=16, rows_per_batch=2, pad_to_multiple_of=16)
    batches = list(data.train_dataloader())
    assert {tuple(batch["input_ids"].shape) for batch in batches} <= {(2, 16), (1, 16)}
    assert sum(int((batch["labels"] != -100).sum()) for batch in batches) > 0


def test_workers_give_the_same_batches(tmp_path: Path) -> None:
    source = write(tmp_path, "jsonl")
    alone, helped = (module(tmp_path, source, max_tokens=16, num_workers=workers) for workers in (0, 2))
    expected, loader = list(alone.train_dataloader()), helped.train_dataloader()
    for _ in range(2):
        for ours, theirs in zip(loader, expected, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_validation_by_fraction_and_by_file(tmp_path: Path) -> None:
    source = write(tmp_path, "jsonl")
    split = module(tmp_path, source, validation=0.4)
    train, validation = documents(split.train_dataloader()), documents(split.val_dataloader())
    assert len(validation) == 2 and sorted(train + validation) == sorted(filter(None, TEXTS))
    again = module(tmp_path, source, validation=0.4)
    assert documents(again.val_dataloader()) == validation
    given = module(tmp_path, source, validation=source)
    assert documents(given.val_dataloader()) == sorted(filter(None, TEXTS))


def test_tokens_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path, "jsonl")
    cache, corpus = TokenCache(tmp_path / "cache", byt5), Corpus(source)
    path = cache.build(corpus)
    with monkeypatch.context() as patch:
        patch.setattr(RowEncoder, "many", lambda *_: pytest.fail("tokenized again"))
        assert cache.build(corpus) == path
    assert not [p for p in path.parent.iterdir() if p.name.startswith(".unfinished")]
    other = ByT5Tokenizer(extra_ids=10)
    assert TokenCache(tmp_path / "cache", other).path(corpus) != path
    assert TokenCache(tmp_path / "cache", byt5, append_eos=False).path(corpus) != path
    Path(source).write_text(json.dumps({"text": "changed"}) + "\n")
    assert cache.build(corpus) != path
    assert len(cache.load(corpus)) == 1


def test_loss_on_the_completion() -> None:
    encode = RowEncoder(byt5, "completion")
    encoded = encode({"prompt": "one plus one", "completion": " is two"}, 0)
    assert whole(encoded) == "one plus one is two</s>" and said(encoded) == " is two</s>"
    assert encoded["length"] == len(encoded["labels"]) == len(encoded["input_ids"])
    chat = RowEncoder(chat_tokenizer(CHAT), "completion")({"prompt": TALK[:3], "completion": TALK[3:]}, 0)
    assert said(chat) == "no|" and whole(chat).startswith("<user>hi|<assistant>yes|")


@pytest.mark.parametrize(("template", "wanted"), [(CHAT, "yes|no|"), (MARKED, "yesno")])
def test_loss_on_what_the_assistant_says(template: str, wanted: str) -> None:
    tokenizer = chat_tokenizer(template)
    if template is MARKED:
        tokenizer = marked_tokenizer()
    encoded = RowEncoder(tokenizer, "chat")({"messages": TALK}, 0)
    assert said(encoded) == wanted if template is CHAT else decoded(tokenizer, encoded) == wanted


def marked_tokenizer() -> Any:
    """A fast tokenizer of characters: marks need one that knows where its tokens come from."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(code): code for code in range(128)} | {"[UNK]": 128}
    rust = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    rust.pre_tokenizer = Split(Regex("."), "isolated")  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust, unk_token="[UNK]")
    tokenizer.chat_template = MARKED
    return tokenizer


def decoded(tokenizer: Any, encoded: dict[str, Any]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens([token for token in encoded["labels"] if token != -100]))


def test_kinds() -> None:
    assert kind_of_rows(["input_ids", "text"], "text") == "tokens"
    assert kind_of_rows(["messages", "text"], "text") == "chat"
    assert kind_of_rows(["prompt", "completion"], "text") == "completion"
    assert kind_of_rows(["body"], "body") == "text"


BAD: dict[str, tuple[Any, tuple[str, ...]]] = {
    "columns": (lambda p: module(p, Dataset.from_dict({"body": ["x"]})), ("['body']", "text_column")),
    "no text": (lambda p: module(p, Dataset.from_dict({"text": ["", None]})), ("2 rows without a single token",)),
    "numbers": (lambda p: module(p, Dataset.from_dict({"text": [1]})), ("row 0 with 'text' of type int",)),
    "file": (lambda p: SequenceDataModule(str(p / "none*.jsonl"), byt5), ("none*.jsonl", "matches none")),
    "fraction": (lambda p: SequenceDataModule("x/y", byt5, validation=1), ("validation=1", "between 0 and 1")),
    "one document": (lambda p: module(p, Dataset.from_dict({"text": ["x"]}), validation=0.5), ("1 documents",)),
    "tokenizer": (lambda p: SequenceDataModule("x/y", 5).tokenizer, ("tokenizer of type int",)),
    "kinds": (
        lambda p: module(p, [write(p, "jsonl"), write(p, "parquet")]),
        ("files of the kinds ['jsonl', 'parquet']",),
    ),
    "template": (
        lambda p: RowEncoder(byt5, "chat")({"messages": TALK}, 3),
        ("row 3, a chat", "ByT5Tokenizer without a chat template"),
    ),
    "messages": (
        lambda p: RowEncoder(chat_tokenizer(CHAT), "chat")({"messages": ["hi"]}, 3),
        ("row 3 with the messages", "'role' and 'content'"),
    ),
    "template that rewrites": (
        lambda p: RowEncoder(chat_tokenizer(FORGETFUL), "chat")({"messages": TALK}, 3),
        ("row 3, a chat in which the template", "'prompt' and 'completion'"),
    ),
    "not prepared": (
        lambda p: TokenCache(p, byt5).load(Corpus(write(p, "jsonl"))),
        ("no tokenized data", "prepare_data"),
    ),
    "window": (lambda p: SequenceDataModule("x/y", byt5, window=0), ("window=0", "from 2")),
    "overlong": (lambda p: SequenceDataModule("x/y", byt5, overlong="cut"), ("overlong='cut'", "truncate")),
    "cost": (lambda p: SequenceDataModule("x/y", byt5, cost={"per_token": 1}), ("cost={'per_token': 1}", "CostModel")),
    "tokens": (lambda p: SequenceDataModule("x/y", byt5, max_tokens=None), ("max_tokens=None",)),
    "rows": (lambda p: SequenceDataModule("x/y", byt5, rows_per_batch="2"), ("rows_per_batch='2'",)),
    "no setup": (
        lambda p: SequenceDataModule("x/y", byt5).train_dataloader(),
        ("train dataloader before setup", "data.setup('fit')"),
    ),
    "no setup for validation": (
        lambda p: SequenceDataModule("x/y", byt5, validation=0.5).val_dataloader(),
        ("validation dataloader before setup",),
    ),
    "too long": (
        lambda p: module(p, write(p, "jsonl"), max_tokens=8, overlong="error").train_dataloader(),
        ("document 0 of 17 tokens", "max_tokens=8"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path: Path, case: str) -> None:
    run, parts = BAD[case]
    with pytest.raises(UlyssesError) as caught:
        run(tmp_path)
    assert [part for part in parts if part not in str(caught.value)] == [], caught.value


def test_a_name_that_no_hub_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UlyssesError, match="nobody/nothing"):
        module(tmp_path, "nobody/nothing")
