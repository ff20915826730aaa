"""Packed rows keep their documents apart, and a packed step is the step on the documents one by one."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exact import BOUND
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCAB, HandWritten, count_targets, llama
from nightly import mostly
from torch import Tensor

import lightning_ulysses
from lightning_ulysses import UlyssesError
from lightning_ulysses.batch.whole import read_batch
from lightning_ulysses.data import PackingCollator
from lightning_ulysses.geometry.batch_keys import BatchRules
from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool

unpadded = PackingCollator(pad_to_multiple_of=None)


def test_one_pack() -> None:
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}, {"input_ids": [5]}, {"input_ids": [6, 7]}]
    batch = PackingCollator(pad_to_multiple_of=5, pad_token_id=9)(rows)
    wanted = {
        "input_ids": [1, 2, 3, 4, 5, 6, 7, 9, 9, 9],
        "labels": [-100, -100, 3, 4, -100, -100, 7, -100, -100, -100],
        "shift_labels": [-100, 3, 4, -100, -100, 7, -100, -100, -100, -100],
        "position_ids": [0, 1, 2, 3, 0, 0, 1, 0, 1, 2],
    }
    assert set(batch) == {*wanted, "cu_seqlens"}
    for key, values in wanted.items():
        assert torch.equal(batch[key], torch.tensor([values])), key
    assert torch.equal(batch["cu_seqlens"], torch.tensor([0, 4, 5, 7, 10], dtype=torch.int32))
    assert batch["cu_seqlens"].dtype == torch.int32


def test_without_padding_no_document_is_added() -> None:
    batch = unpadded([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}])
    assert batch["cu_seqlens"].tolist() == [0, 3, 5] and batch["input_ids"].shape == (1, 5)


def test_several_packs() -> None:
    packs = [[{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}], [{"input_ids": [6, 7]}]]
    batch = unpadded(packs)
    assert "cu_seqlens" not in batch
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch["shift_labels"].tolist() == [[2, 3, -100, 5, -100], [7, -100, -100, -100, -100]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5], [-100, 7, -100, -100, -100]]


def test_one_pack_in_a_list_is_one_row() -> None:
    rows = [{"input_ids": [1, 2, 3]}]
    for key, value in unpadded(rows).items():
        assert torch.equal(unpadded([rows])[key], value)


@pytest.mark.parametrize(
    ("total", "multiple", "length"), [(5, "auto", 128), (128, "auto", 128), (5, None, 5), (9, 8, 16)]
)
def test_length(total: int, multiple: Any, length: int) -> None:
    assert PackingCollator(pad_to_multiple_of=multiple)([{"input_ids": [1] * total}])["labels"].shape == (1, length)


def frozen(values: list[int], dtype: Any) -> np.ndarray:
    array = np.array(values, dtype)
    array.flags.writeable = False
    return array


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "make",
    [list, tuple, torch.tensor, partial(torch.tensor, dtype=torch.int32), np.array]
    + [partial(frozen, dtype=dtype) for dtype in (np.int64, np.int32, np.uint16)],
)
def test_kinds_of_rows(make: Any) -> None:
    rows = [
        {"input_ids": make([1, 2, 3]), "labels": make([1, 2, 3])},
        {"input_ids": make([4, 5]), "labels": make([4, 5])},
    ]
    batch = unpadded(rows)
    wanted = unpadded([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}])
    for key, value in wanted.items():
        assert torch.equal(batch[key], value) and batch[key].dtype == value.dtype
    assert list(rows[0]["labels"]) == [1, 2, 3], "rows are not changed in place"


@pytest.mark.parametrize("make", [list, tuple, torch.tensor, np.array])
def test_bare_tokens(make: Any) -> None:
    wanted = unpadded([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}])
    pack = [make([1, 2, 3]), make([4, 5])]
    assert all(torch.equal(unpadded(pack)[key], value) for key, value in wanted.items())
    assert unpadded([pack, pack])["input_ids"].tolist() == [[1, 2, 3, 4, 5]] * 2


def test_tokenizer_output() -> None:
    from transformers import BatchEncoding

    rows = [BatchEncoding({"input_ids": [0, 1, 2, 3], "attention_mask": [0, 1, 1, 1]})]
    batch = unpadded(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3]] and "attention_mask" not in batch
    rows = [{"input_ids": [1, 2, 0, 0], "attention_mask": [1, 1, 0, 0], "position_ids": [0, 1, 2, 3], "id": 7}]
    assert unpadded(rows)["input_ids"].tolist() == [[1, 2]]


def test_further_fields_and_metadata() -> None:
    row = {
        "input_ids": [1, 2, 3],
        "speaker": [4, 5, 6],
        "weights": [0.5, 1.0, 2.0],
        "boxes": np.ones((3, 4)),
        "text": "abc",
        "tokens": ["a", "b", "c"],
        "words": np.array(["a", "b", "c", "d"]),
        "messages": [{"role": "user"}],
        "number": 3,
        "scalar": torch.tensor(3),
        "nothing": None,
    }
    batch = PackingCollator(pad_to_multiple_of=4)([row, row])
    assert set(batch) == {
        "input_ids",
        "labels",
        "shift_labels",
        "position_ids",
        "cu_seqlens",
        "speaker",
        "weights",
        "boxes",
    }
    assert batch["speaker"].tolist() == [[4, 5, 6, 4, 5, 6, 0, 0]]
    assert batch["weights"].dtype == torch.float32 and batch["weights"][0, 3:].tolist() == [0.5, 1.0, 2.0, 0.0, 0.0]
    assert batch["boxes"].shape == (1, 8, 4) and batch["boxes"].sum() == 24
    with pytest.raises(UlyssesError, match="sequence_dims"):
        read_batch(batch, BatchRules(), 2)
    whole = read_batch(batch, BatchRules({"speaker": 1, "weights": 1, "boxes": 1}), 2)
    assert whole.shard(1)[0]["boxes"].shape == (1, 4, 4)


def test_loss_mask_becomes_labels() -> None:
    rows = [{"input_ids": [1, 2, 3, 4], "loss_mask": [1, 0, 1, 1]}, {"input_ids": [5, 6], "loss_mask": [True, True]}]
    rows[1]["loss_mask"] = [1, 1]
    batch = PackingCollator(pad_to_multiple_of=8)(rows)
    assert batch["loss_mask"].tolist() == [[0, 0, 1, 1, 0, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 3, 4, -100, 6, -100, -100]]
    assert batch["shift_loss_mask"].tolist() == [[0, 1, 1, 0, 1, 0, 0, 0]]
    assert batch["shift_labels"].tolist() == [[-100, 3, 4, -100, 6, -100, -100, -100]]
    assert set(read_batch(batch, BatchRules(), 2).counts_of_group().items()) == {
        *((key, 3.0) for key in ("labels", "shift_labels", "loss_mask", "shift_loss_mask")),
        ("tokens", 8.0),
    }


def test_targets_that_are_shifted_already() -> None:
    rows = [{"input_ids": [1, 2], "shift_labels": [2, 3], "loss_mask": [1, 0]}] * 2
    batch = PackingCollator(pad_to_multiple_of=6)(rows)
    assert batch["shift_labels"].tolist() == [[2, 3, 2, 3, -100, -100]]
    assert batch["loss_mask"].tolist() == [[1, 0, 1, 0, 0, 0]]
    assert "labels" not in batch and "shift_loss_mask" not in batch


ok = {"input_ids": [1, 2]}
BAD: dict[str, tuple[Any, str]] = {
    "no rows": ([], "without documents"),
    "an empty pack": ([[ok], []], "without documents"),
    "no input_ids": ([{"tokens": [1, 2]}], r"without input_ids.*'input_ids'.*tokenize"),
    "no mapping": (["abc"], "a row of type str"),
    "tokens of several documents": ([[[[1, 2], [3]]]], "a row of type list"),
    "empty row": ([ok, {"input_ids": []}], "without a single token"),
    "text": ([{"input_ids": "abc"}], r"row\['input_ids'\], a str"),
    "two rows in one": ([{"input_ids": torch.ones(1, 3).long()}], r"shape \(1, 3\).*return_tensors"),
    "floats": ([{"input_ids": [0.5, 1.0]}], "float32.*integers"),
    "labels": ([{"input_ids": [1, 2], "labels": [1]}], r"unequal length in one row: \{'input_ids': 2, 'labels': 1\}"),
    "unknown labels": ([{"input_ids": [1, 2], "labels": [1, None]}], r"row\['labels'\]"),
    "further field": ([{"input_ids": [1, 2], "speaker": [1, 2, 3]}], "unequal length.*'speaker': 3"),
    "different fields": ([ok, ok | {"speaker": [1, 2]}], "different fields.*'speaker'"),
    "mask with a hole": ([{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}], "keeps 2 of 3 tokens"),
    "mask of zeros": ([{"input_ids": [1, 2], "attention_mask": [0, 0]}], "keeps 0 of 2 tokens"),
    "packed before": ([{"input_ids": [1, 2], "position_ids": [0, 0]}], "carry position_ids already"),
    "lengths": ([{"input_ids": [1, 2], "cu_seqlens": [0, 2]}], "carry cu_seqlens already"),
    "too long": ([ok, {"input_ids": [1] * 4}], "6 tokens in 2 documents with max_tokens=5.*never truncates"),
    "second too long": ([[ok], [{"input_ids": [1] * 6}]], "6 tokens in 1 documents"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows(case: str) -> None:
    rows, message = BAD[case]
    with pytest.raises(UlyssesError, match=message):
        PackingCollator(max_tokens=5)(rows)


@pytest.mark.parametrize("setting", [{"max_tokens": 0}, {"pad_to_multiple_of": 0}, {"pad_to_multiple_of": "8"}])
def test_bad_settings(setting: dict[str, Any]) -> None:
    with pytest.raises(UlyssesError, match=next(iter(setting))):
        PackingCollator(**setting)


def test_rows_of_exactly_max_tokens_fit() -> None:
    assert PackingCollator(max_tokens=5)([ok, {"input_ids": [1] * 3}])["input_ids"].shape == (1, 128)


documents = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(st.lists(documents, min_size=1, max_size=3), st.sampled_from([None, 1, 4, 7]), st.integers(1, 4), st.data())
def test_no_token_is_lost_doubled_or_moved(lengths: list[list[int]], multiple: Any, ranks: int, data: Any) -> None:
    token = iter(range(1, 1000))
    packs = [[{"input_ids": [next(token) for _ in range(length)]} for length in pack] for pack in lengths]
    keep = {t: data.draw(st.booleans()) for pack in packs for row in pack for t in row["input_ids"]}
    for pack in packs:
        for row in pack:
            row["labels"] = [t if keep[t] else -100 for t in row["input_ids"]]
    batch = PackingCollator(pad_to_multiple_of=multiple)(packs if len(packs) > 1 else packs[0])
    seq_len = batch["input_ids"].shape[1]
    if seq_len < ranks:
        return
    whole = read_batch(batch, BatchRules(), ranks)
    found = whole.layout.documents or (((0, seq_len),),) * len(packs)
    targets = 0
    for number, pack in enumerate(packs):
        for row, (begin, end) in zip(pack, found[number], strict=False):
            assert batch["input_ids"][number, begin:end].tolist() == row["input_ids"]
            wanted = [*row["labels"][1:], -100]
            assert batch["shift_labels"][number, begin:end].tolist() == wanted
            assert batch["labels"][number, begin:end].tolist() == [-100, *row["labels"][1:]]
            assert batch["position_ids"][number, begin:end].tolist() == list(range(end - begin))
            targets += sum(label != -100 for label in wanted)
        total = sum(len(row["input_ids"]) for row in pack)
        assert found[number][len(pack) :] == (((total, seq_len),) if total < seq_len else ())
        assert (batch["input_ids"][number, total:] == 0).all()
        assert (batch["labels"][number, total:] == -100).all() and (batch["shift_labels"][number, total:] == -100).all()
    counts = whole.counts_of_group()
    assert counts["labels"] == counts["shift_labels"] == targets


def test_a_slice_of_nothing_but_padding_gets_a_stand_in_that_does_not_count() -> None:
    whole = read_batch(PackingCollator(pad_to_multiple_of=8)([{"input_ids": [1, 2, 3]}]), BatchRules(), 2)
    part, _, seen = whole.shard(1, stand_in=True)
    assert whole.counts["shift_labels"] == (2.0, 0.0) and seen["shift_labels"] == 1
    assert int((part["shift_labels"] != -100).sum()) == 1 == int((part["labels"] != -100).sum())


class PackedGPT(HandWritten):
    """A GPT written by hand that keeps documents apart by ``cu_seqlens`` and numbers them by ``position_ids``."""

    def __init__(self, is_causal: bool = True) -> None:
        super().__init__(heads=4, kv_heads=2)
        self.is_causal = is_causal

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        attend = partial(
            lightning_ulysses.ulysses_attention, is_causal=self.is_causal, cu_seqlens=batch.get("cu_seqlens")
        )
        hidden = self.embed(batch["input_ids"]) + self.place(batch["position_ids"])
        for block in self.blocks:
            block.attend = attend
            hidden = block(hidden)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), batch["shift_labels"].flatten())


def rows_of(lengths: list[int], seed: int = 0) -> list[dict[str, Tensor]]:
    """Documents of which every second one starts with a prompt that is no target."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        tokens = torch.randint(0, VOCAB, (length,), generator=generator)
        labels = tokens.clone()
        labels[: (number % 2) * (length // 2)] = -100
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


def one_by_one(rows: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same documents, each a batch of its own, made without the collator."""
    batches = []
    for row in rows:
        positions = torch.arange(len(row["labels"]))
        shifted = F.pad(row["labels"][1:], (0, 1), value=-100)
        batches.append({key: t[None] for key, t in {**row, "position_ids": positions, "shift_labels": shifted}.items()})
    return batches


class KeywordGPT2(L.LightningModule):
    """Absolute positions, and a module that passes on neither positions nor shifted labels."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        config = GPT2Config(vocab_size=VOCAB, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **sizes)
        self.model = GPT2LMHeadModel(config)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


# A one-token document, and boundaries on both sides of every cut.
LENGTHS = [7, 12, 1, 13]
sdpa, flash = llama(), llama(implementation="flash_attention_2")
CASES: dict[str, tuple[Any, Any, list[list[list[int]]], SplitRun]] = {
    # module, pad_to_multiple_of, micro-batches of packs of document lengths
    "sdpa, 2": (sdpa, None, [[LENGTHS]], SplitRun()),
    "sdpa, 4, padded": (sdpa, 16, [[LENGTHS]], SplitRun(4, 4)),
    "sdpa, 4, mostly padding": (sdpa, 128, [[LENGTHS]], SplitRun(4, 4)),
    "sdpa, 2, two rows": (sdpa, 16, [[LENGTHS, [2, 20]]], SplitRun()),
    "sdpa, 2 x 2, two rows": (sdpa, None, [[LENGTHS, [2, 20]], [[1], [9, 9]]], SplitRun(4, 2)),
    "sdpa, data parallel": (sdpa, None, [[LENGTHS], [[2, 20]]], SplitRun(2, 1)),
    "sdpa, zero 3, accumulated": (
        sdpa,
        "auto",
        [[LENGTHS], [[2, 20]]],
        SplitRun(2, 2, {"stage": 3}, {"accumulate_grad_batches": 2}),
    ),
    "one document": (sdpa, 8, [[[19]]], SplitRun()),
    "sdpa, data parallel, two rows": (sdpa, 16, [[LENGTHS, [2, 20]], [[2, 20]]], SplitRun(2, 1)),
    "absolute positions": (KeywordGPT2, 16, [[LENGTHS]], SplitRun()),
    "absolute positions, data parallel": (KeywordGPT2, 16, [[LENGTHS], [[2, 20]]], SplitRun(2, 1)),
    "keywords": (llama(call="keywords"), 16, [[LENGTHS]], SplitRun()),
    "padded by the strategy too": (sdpa, 8, [[LENGTHS]], SplitRun(strategy={"pad_to_multiple_of": 48})),
    "flash, 2, padded": (flash, 16, [[LENGTHS]], SplitRun()),
    "flash, 4": (flash, None, [[LENGTHS]], SplitRun(4, 4)),
    "flash, 4, two rows": (flash, 16, [[LENGTHS, [2, 20]]], SplitRun(4, 4)),
    "hand-written, 2": (PackedGPT, None, [[LENGTHS]], SplitRun()),
    "hand-written, 4, padded": (PackedGPT, 16, [[LENGTHS]], SplitRun(4, 4)),
    "hand-written, 2 x 2": (PackedGPT, 16, [[LENGTHS], [[2, 20]]], SplitRun(4, 2)),
    "bidirectional, padded": (partial(PackedGPT, is_causal=False), 16, [[LENGTHS]], SplitRun()),
}


def packed(lengths: list[list[list[int]]], multiple: Any) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """The packed micro-batches, and all their documents one by one."""
    packs = [[rows_of(pack, 10 * i + j) for j, pack in enumerate(batch)] for i, batch in enumerate(lengths)]
    collator = PackingCollator(pad_to_multiple_of=multiple)
    return [collator(batch) for batch in packs], one_by_one([row for batch in packs for pack in batch for row in pack])


# The same in other worlds.
SELDOM = (
    *("sdpa, 4, mostly padding", "sdpa, 2 x 2, two rows", "sdpa, data parallel, two rows", "flash, 4"),
    *("absolute positions, data parallel", "hand-written, 4, padded", "hand-written, 2 x 2"),
)


@pytest.mark.parametrize("case", mostly(CASES, SELDOM))
def test_a_packed_step_is_the_step_on_the_documents(pool: ProcessPool, case: str) -> None:
    make, multiple, lengths, run = CASES[case]
    batches, single = packed(lengths, multiple)
    reference = fit_single(sdpa if make is flash else make, [single], count_targets)
    assert reference.step().norm() > 1e-3
    for result in fit_split(pool, make, batches, run):
        assert compare(result, reference).largest <= BOUND, compare(result, reference)


LEAKS: dict[str, Any] = {
    "documents see each other": lambda b: {k: b[k] for k in ("input_ids", "labels", "shift_labels")},
    "a target crosses": lambda b: {**b, "shift_labels": F.pad(b["input_ids"][:, 1:], (0, 1), value=-100)},
    "padding counts": lambda b: {**b, "shift_labels": b["shift_labels"].clone().index_fill(1, torch.tensor([40]), 0)},
    "a boundary is off by one": lambda b: {**b, "cu_seqlens": b["cu_seqlens"] + (torch.arange(6) == 1).int()},
}


@pytest.mark.parametrize("leak", LEAKS)
def test_negative_control(pool: ProcessPool, leak: str) -> None:
    batches, single = packed([[LENGTHS]], 16)
    reference = fit_single(sdpa, [single], count_targets)
    broken = [LEAKS[leak](batch) for batch in batches]
    assert compare(fit_split(pool, sdpa, broken, SplitRun())[0], reference).largest > 100 * BOUND
