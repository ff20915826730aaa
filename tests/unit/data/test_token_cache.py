"""When stored tokens are used again, what they take on disk, and what becomes of damaged ones and of bad rows."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from transformers import ByT5Tokenizer

from lightning_ulysses import UlyssesError
from lightning_ulysses.data import SequenceDataModule
from lightning_ulysses.data.corpus import Corpus, stamp
from lightning_ulysses.data.token_cache import TokenCache
from lightning_ulysses.data.tokenizer import TextEncoder
from lightning_ulysses.data.tokenizer_key import describe_tokenizer
from lightning_ulysses.data.tokens import BadRows

byt5 = ByT5Tokenizer()


def write_lines(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts_of(folder: Path, source: Any, tokenizer: Any = byt5, **settings: Any) -> list[str]:
    cache, corpus = TokenCache(folder, tokenizer, **settings), Corpus(source)
    cache.build(corpus)
    return [byt5.decode(row["input_ids"], skip_special_tokens=True) for row in cache.load(corpus)]  # type: ignore[misc]


def same_size(path: Path, text: str) -> None:
    """Writes another text of the same size, and sets the times back."""
    before = path.stat()
    path.write_text(text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("source", ["data", "data/*.txt"])
def test_files_are_known_by_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    cache = tmp_path / "cache"
    for project in ("one", "two"):
        (tmp_path / project / "data").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / project)
        Path("data/a.txt").write_text(f"of {project}")
        assert texts_of(cache, source) == [f"of {project}"]
    same_size(Path("data/a.txt"), "of TWO")
    assert texts_of(cache, source) == ["of TWO"]
    Path("data/b.txt").write_text("more\nthan one line")
    # One row for each file, in a folder as in a glob.
    assert texts_of(cache, source) == ["of TWO", "more\nthan one line"]
    shutil.rmtree("data")
    Path("data").mkdir()
    Path("data/a.txt").write_text("of TWO")
    before = len(list(cache.iterdir()))
    assert texts_of(cache, source) == ["of TWO"] and len(list(cache.iterdir())) == before


def test_a_saved_dataset_that_is_written_anew(tmp_path: Path) -> None:
    for text in ("first", "other"):
        Dataset.from_dict({"text": [text]}).save_to_disk(str(tmp_path / "saved"))
        assert texts_of(tmp_path / "cache", str(tmp_path / "saved")) == [text]
        assert texts_of(tmp_path / "cache", Dataset.from_dict({"text": [text]})) == [text]


def test_large_files_change_with_their_times(tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(b"a" * 300_000)
    before = stamp(str(file))
    assert stamp(str(file)) == before
    content = bytearray(b"a" * 300_000)
    content[100_000] = ord("b")
    time.sleep(0.02)
    same_size(file, content.decode())
    assert stamp(str(file)) != before


OWN = """
class Own:
    def __init__(self):
        self.seen, self.calls, self.shift = {}, 0, SHIFT
    def __call__(self, text):
        self.calls += 1
        return self.seen.setdefault(text, [ord(letter) % 256 + 3 for letter in SPELLING])
"""


def own_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch, spelling: str, shift: int = 0) -> Any:
    (folder / "own_tokenizer.py").write_text(OWN.replace("SPELLING", spelling).replace("SHIFT", str(shift)))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    sys.modules.pop("own_tokenizer", None)
    importlib.invalidate_caches()
    import linecache

    linecache.clearcache()
    return importlib.import_module("own_tokenizer").Own()


def test_a_tokenizer_without_a_vocabulary_whose_code_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(write_lines(tmp_path / "rows.jsonl", ["ab zyzzyva"]))
    plain = own_tokenizer(tmp_path, monkeypatch, "text")
    assert texts_of(tmp_path / "cache", source, plain) == ["ab zyzzyva"]
    # A change that shows in the text of the corpus alone, and in none that the key tries.
    changed = own_tokenizer(tmp_path, monkeypatch, "text.replace('zyzzyva', 'aa')")
    assert texts_of(tmp_path / "cache", source, changed) == ["ab aa"]


def test_a_tokenizer_is_the_same_after_it_was_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used, fresh = own_tokenizer(tmp_path, monkeypatch, "text"), own_tokenizer(tmp_path, monkeypatch, "text")
    for word in ("many", "other", "words"):
        used(word)
    used.seen["A text"] = [1]
    assert describe_tokenizer(used) == describe_tokenizer(fresh)
    fresh.shift = 1
    assert describe_tokenizer(used) != describe_tokenizer(fresh)


def test_functions_with_what_they_hold() -> None:
    def make(step: int) -> Any:
        return lambda text: [ord(letter) + 3 for letter in text if letter != chr(20_000 + step)]

    assert describe_tokenizer(make(1)) == describe_tokenizer(make(1)) != describe_tokenizer(make(2))
    with pytest.raises(UlyssesError, match="a tokenizer that returns"):
        describe_tokenizer(lambda text: "no ids")


def fast_tokenizer(folder: Path) -> Any:
    """A tokenizer.json that pads and truncates."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    rust = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "b": 2, "[EOS]": 3}, unk_token="[UNK]"))
    rust.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    rust.enable_truncation(4)
    rust.enable_padding(length=6, pad_id=0, pad_token="[UNK]")
    rust.save(str(folder / "tokenizer.json"))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), unk_token="[UNK]", eos_token="[EOS]", pad_token="[UNK]"
    )


def test_truncation_and_padding_of_a_tokenizer(tmp_path: Path) -> None:
    source = str(write_lines(tmp_path / "rows.jsonl", ["a b a b a b a", "b"]))
    (tmp_path / "tokenizer").mkdir()
    cache = TokenCache(tmp_path / "cache", fast_tokenizer(tmp_path / "tokenizer"))
    path = cache.build(Corpus(source))
    # Another process loads the tokenizer anew.
    other = TokenCache(tmp_path / "cache", fast_tokenizer(tmp_path / "tokenizer"))
    assert other.path(Corpus(source)) == path
    rows = other.load(Corpus(source))
    assert [rows[number]["input_ids"].tolist() for number in range(2)] == [[1, 2, 1, 2, 1, 2, 1, 3], [2, 3]]


def test_many_texts_at_once_give_the_tokens_of_each(tmp_path: Path) -> None:
    texts = ["a b", "", "b " * 50, "a"]
    for tokenizer in (fast_tokenizer(tmp_path), byt5, lambda text, add_special_tokens: [len(text), add_special_tokens]):
        encoder = TextEncoder(tokenizer)
        for special in (True, False):
            assert encoder.many(texts, special) == [encoder.one(text, special) for text in texts]
    assert TextEncoder(fast_tokenizer(tmp_path))._rust is not None and TextEncoder(byt5)._rust is None


def test_names_that_look_like_globs_and_like_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(Path("texts [1].jsonl"), ["one"])
    write_lines(Path("folder [a]/rows.jsonl"), ["two"])
    assert texts_of(tmp_path / "cache", "texts [1].jsonl") == ["one"]
    assert texts_of(tmp_path / "cache", ["folder [a]", "texts [1].jsonl"]) == ["two", "one"]
    names = ("org/data-v1.5", "org/data.v2", "wikitext", "glue-1.0")
    assert [Corpus(name).name for name in names] == list(names)
    for missing in ("org/data.jsonl", "notes.rst", "./org", "a/b/c", "folder [a]/data-v1.5", "rows.txt.gz"):
        with pytest.raises(UlyssesError, match="is no file"):
            Corpus(missing).files()


def test_splits_of_a_folder(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        write_lines(tmp_path / "data" / f"{name}.jsonl", [name])
    (tmp_path / "data" / "README.md").write_text("about")
    assert [Path(file).name for file in Corpus(str(tmp_path / "data")).files()] == ["train.jsonl"]
    assert [Path(file).name for file in Corpus(str(tmp_path / "data"), None, "validation").files()] == ["valid.jsonl"]
    with pytest.raises(UlyssesError, match="named for the split 'test'"):
        Corpus(str(tmp_path / "data"), None, "test").files()


def test_what_the_cache_takes_on_disk(tmp_path: Path) -> None:
    texts = [f"some text number {number} " * 20 for number in range(200)]
    source = str(write_lines(tmp_path / "rows.jsonl", texts))
    rows = TokenCache(tmp_path / "cache", byt5)
    path = rows.build(Corpus(source))
    tokens = int(rows.load(Corpus(source)).lengths.sum())
    used = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file())
    assert 4 * tokens <= used < 4 * tokens + 8 * len(texts) + 1000
    assert list((tmp_path / "cache").iterdir()) == [path]
    # 4 bytes more where labels differ, also for the rows before the first that differs.
    given = Dataset.from_dict({"input_ids": [[5, 6], [7, 8]], "labels": [[5, 6], [-100, 8]]})
    cache = TokenCache(tmp_path / "other", byt5)
    path = cache.build(Corpus(given))
    assert (path / "tokens.bin").stat().st_size == (path / "labels.bin").stat().st_size == 16
    assert [row["labels"].tolist() for row in cache.load(Corpus(given))] == [[5, 6], [-100, 8]]  # type: ignore[attr-defined]


def test_other_users_may_read_and_leftovers_are_removed(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        source, folder = str(write_lines(tmp_path / "rows.jsonl", ["a"])), tmp_path / "cache"
        dead = folder / ".unfinished-dead"
        dead.mkdir(parents=True)
        (dead / "lock").touch()
        (dead / "tokens.bin").write_bytes(b"1234")
        os.utime(dead, (0, 0))
        path = TokenCache(folder, byt5).build(Corpus(source))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o644}
    assert list(folder.iterdir()) == [path]


def test_several_writers(tmp_path: Path) -> None:
    source = str(write_lines(tmp_path / "rows.jsonl", ["a", "b"]))
    cache, corpus = TokenCache(tmp_path / "cache", byt5), Corpus(source)
    path = cache.path(corpus)
    with cache._unfinished() as slower:
        # The folder of one that is still writing stays.
        os.utime(slower, (0, 0))
        assert cache.build(corpus) == path and slower.exists()
        cache._write(corpus, slower)
    assert len(cache.load(corpus)) == 2 and list((tmp_path / "cache").iterdir()) == [path]


def cut(path: Path) -> None:
    (path / "tokens.bin").write_bytes((path / "tokens.bin").read_bytes()[:-4])


def flip(path: Path) -> None:
    content = bytearray((path / "tokens.bin").read_bytes())
    content[1] ^= 1
    (path / "tokens.bin").write_bytes(bytes(content))


DAMAGES = {
    "cut": (cut, "tokens.bin has"),
    "flipped": (flip, "tokens.bin has changed"),
    "gone": (lambda path: (path / "ends.bin").unlink(), "ends.bin"),
    "no note": (lambda path: (path / "note.json").unlink(), "note.json cannot be read"),
    "note": (lambda path: (path / "note.json").write_text("{"), "note.json cannot be read"),
    "other note": (lambda path: (path / "note.json").write_text('{"x": 1}'), "note.json cannot be read"),
    "empty note": (lambda path: (path / "note.json").write_text('{"tokens": 1}'), "note.json does not fit"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_tokens_are_named_and_made_again(tmp_path: Path, kind: str) -> None:
    damage, words = DAMAGES[kind]
    source = str(write_lines(tmp_path / "rows.jsonl", ["a text", "b"]))
    cache, corpus = TokenCache(tmp_path / "cache", byt5), Corpus(source)
    path = cache.build(corpus)
    damage(path)  # type: ignore[no-untyped-call]
    if kind != "flipped":
        with pytest.raises(UlyssesError, match="damaged tokens"):
            cache.load(corpus)
    with pytest.warns(UserWarning, match="are damaged") as caught:
        assert cache.build(corpus) == path
    assert len(caught) == 1 and words in str(caught[0].message)
    assert texts_of(tmp_path / "cache", source) == ["a text", "b"]
    assert list((tmp_path / "cache").iterdir()) == [path]


BAD_LINES = ['{"text": "a"}', "", "{no json", '{"text": 5}', "[1]", '{"text": null}', '{"other": 1}', '{"text": "b"}']


@pytest.mark.parametrize("num_proc", [None, pytest.param(2, marks=pytest.mark.processes)])
def test_bad_rows_are_named_or_skipped_and_counted(tmp_path: Path, num_proc: int | None) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(BAD_LINES))
    with pytest.raises(UlyssesError, match=r"row 1 \(line 3 of .*rows.jsonl\) that cannot be read.*bad_rows='skip'"):
        TokenCache(tmp_path / "cache", byt5, num_proc=num_proc).build(Corpus(str(source)))
    assert list((tmp_path / "cache").iterdir()) == []
    for _ in range(2):
        # Also where the tokens are there already.
        with pytest.warns(UserWarning, match=r"4 of 7 rows are bad and left out: row 1 .*row 2 .*int.*row 3 .*row 5 "):
            assert texts_of(tmp_path / "cache", str(source), bad_rows="skip", num_proc=num_proc) == ["a", "b"]
    data = SequenceDataModule(str(source), byt5, 64, cache_dir=str(tmp_path / "cache"), bad_rows="skip")
    with pytest.warns(UserWarning, match="4 of 7 rows"):
        data.prepare_data()
    with pytest.raises(UlyssesError, match="bad_rows='drop'"):
        SequenceDataModule(str(source), byt5, 64, bad_rows="drop")  # type: ignore[arg-type]


def test_a_text_that_the_tokenizer_refuses(tmp_path: Path) -> None:
    def refuses(text: str) -> list[int]:
        return [ord(letter) for letter in text if 1 // (letter != "!")] if len(text) < 9 else [1]

    source = str(write_lines(tmp_path / "rows.jsonl", ["fine", "bad!", "good"]))
    with pytest.raises(UlyssesError, match=r"row 1 .*on which the tokenizer fails \(ZeroDivisionError"):
        TokenCache(tmp_path / "cache", refuses).build(Corpus(source))


def test_tokens_that_cannot_be(tmp_path: Path) -> None:
    for number, row in enumerate(
        [{"labels": [1]}, {"input_ids": [1, 2**31]}, {"input_ids": [-1, 2]}, {"labels": [0.5, 1]}]
    ):
        rows = Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]} | row])
        with pytest.raises(UlyssesError, match="row 0 with"):
            TokenCache(tmp_path / str(number), byt5).build(Corpus(rows))


@pytest.mark.parametrize("kind", ["array", "lines", "gz", "csv", "mixed"])
def test_files_of_other_forms(tmp_path: Path, kind: str) -> None:
    rows = [{"text": "a", "n": 1}, {"text": "b", "n": "x"}]
    if kind == "array":
        (tmp_path / "rows.json").write_text(json.dumps(rows, indent=2))
    elif kind == "gz":
        with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
            file.write("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        (tmp_path / "rows.csv").write_text("text,n\na,1\nb,x\n")
    else:
        (tmp_path / "rows.json").write_text(json.dumps(rows[0]))
        (tmp_path / ("rows2.json" if kind == "lines" else "rows2.jsonl")).write_text(json.dumps(rows[1]))
    cache = tmp_path / "cache"
    assert texts_of(cache, [str(file) for file in sorted(tmp_path.glob("rows*"))]) == ["a", "b"]
    # The copies that `datasets` makes of some are gone.
    assert [sorted(file.name for file in folder.iterdir()) for folder in cache.iterdir()] == [
        ["ends.bin", "note.json", "tokens.bin"]
    ]


def test_sources_that_cannot_be(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["a"]})
    for source in ([], DatasetDict({"train": rows}), rows.to_iterable_dataset(), 5, [1]):
        with pytest.raises(UlyssesError, match="give one split, such as dataset"):
            SequenceDataModule(source, byt5)
    (tmp_path / "bad.parquet").write_text("no")
    (tmp_path / "bad.csv").write_text('a,b\n"')
    for name in ("bad.parquet", "bad.csv"):
        with pytest.raises(UlyssesError, match=name):
            TokenCache(tmp_path / "cache", byt5).build(Corpus(str(tmp_path / name)))


def test_a_name_on_the_hub_is_known_by_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    hub = {"revision": "1", "text": "first"}

    class Builder:
        name, cache_dir = "parquet", str(tmp_path / "none")

        def __init__(self, *_: Any) -> None:
            if not hub:
                raise ConnectionError("offline")
            self.hash = hub["revision"]

    monkeypatch.setattr(datasets, "load_dataset_builder", Builder)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Dataset.from_dict({"text": [hub["text"]]}))
    assert texts_of(tmp_path / "cache", "org/name") == ["first"]
    hub.update(revision="2", text="second")
    assert texts_of(tmp_path / "cache", "org/name") == ["second"]
    hub.clear()
    with pytest.warns(UserWarning, match="as it was when it was loaded last"):
        assert texts_of(tmp_path / "cache", "org/name") == ["second"]
    with pytest.raises(UlyssesError, match="org/other"):
        texts_of(tmp_path / "cache", "org/other")


def test_rows_can_be_chosen_and_sent(tmp_path: Path) -> None:
    import pickle

    cache = TokenCache(tmp_path / "cache", byt5)
    corpus = Corpus(Dataset.from_dict({"input_ids": [[1], [2, 2], [3, 3, 3]]}))
    cache.build(corpus)
    rows = pickle.loads(pickle.dumps(cache.load(corpus).select([2, 0]).select(np.array([1, 0]))))
    assert rows.lengths.tolist() == [1, 3] and [rows[i]["input_ids"].tolist() for i in (0, 1, -1)] == [
        [1],
        [3] * 3,
        [3] * 3,
    ]
    assert len(pickle.dumps(cache.load(corpus))) < 1000
    with pytest.raises(IndexError):
        rows[2]


def test_settings_of_bad_rows() -> None:
    assert BadRows.__args__ == ("error", "skip")  # type: ignore[attr-defined]
