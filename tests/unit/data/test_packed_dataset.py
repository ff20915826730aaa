"""Packs through a DataLoader: rows, lengths, and documents in part."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from packs import lengths_of
from torch.utils.data import DataLoader, Dataset

from lightning_ulysses.data import PackingCollator, Piece, SequenceShardSampler
from lightning_ulysses.errors import UlyssesError


class Rows(Dataset[dict[str, Any]]):
    """Documents whose tokens say whose they are."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": [1000 * index + i for i in range(self.lengths[index])], "name": f"document {index}"}


class ManyRows(Rows):
    def __getitem__(self, index: int) -> dict[str, Any]:
        raise AssertionError

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [Rows.__getitem__(self, index) for index in indices]


@pytest.mark.parametrize("kind", [Rows, ManyRows])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_every_token_of_split_documents(kind: type[Rows], workers: int) -> None:
    rows = kind([*lengths_of(30), 350])
    one = SequenceShardSampler(rows, rows.lengths, 100, overlong="split", window=2)
    loader = DataLoader(
        one.packed,  # type: ignore[arg-type]
        sampler=one,
        batch_size=None,
        collate_fn=PackingCollator(100, pad_to_multiple_of=None),
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    batches = list(loader)
    assert len(batches) == len(loader) == len(one)
    found = torch.cat([batch["input_ids"].flatten() for batch in batches])
    wanted = [1000 * i + p for i, length in enumerate(rows.lengths) for p in range(length)]
    assert sorted(found.tolist()) == wanted
    assert all(batch["input_ids"].shape[0] == 1 for batch in batches)


def test_several_packs_per_batch() -> None:
    rows = Rows(lengths_of(40))
    one = SequenceShardSampler(rows, "input_ids", 100, num_replicas=2, rank=1)
    loader = DataLoader(one.packed, sampler=one, batch_size=3, collate_fn=PackingCollator())  # type: ignore[arg-type]
    shapes = [batch["input_ids"].shape for batch in loader]
    assert len(loader) == len(shapes) == -(-len(one) // 3) and {shape[0] for shape in shapes[:-1]} == {3}


def test_as_batch_sampler_of_any_dataset() -> None:
    rows = Rows(lengths_of(40))
    one = SequenceShardSampler(rows, rows.lengths, 100)
    loader = DataLoader(rows, batch_sampler=one, collate_fn=lambda pack: [row["name"] for row in pack])
    assert list(loader) == [[f"document {index}" for index in pack] for pack in one]


def test_a_piece_is_no_index() -> None:
    for dataset in ([1, 2, 3], np.arange(3), torch.arange(3)):
        with pytest.raises((TypeError, IndexError, UlyssesError)):
            dataset[Piece(1, 0, 1)]  # type: ignore[index]


def test_rows_of_other_kinds() -> None:
    for kind in (list, np.array, torch.tensor):
        rows = [kind([1, 2, 3]), kind([4, 5])]
        packed = SequenceShardSampler(rows, [3, 2], 5).packed
        assert len(packed) == 2
        assert [list(map(int, row)) for row in packed[[1, Piece(0, 1, 3)]]] == [[4, 5], [2, 3]]
        assert [list(map(int, row)) for row in packed[1]] == [[4, 5]]
    pairs = SequenceShardSampler([("a", "b")], [3], 5).packed
    assert pairs[0] == [("a", "b")]
    with pytest.raises(UlyssesError, match="document 0, a tuple, of which a pack holds tokens 1 to 3"):
        pairs[[Piece(0, 1, 3)]]


def test_lengths_that_are_not_the_documents() -> None:
    rows = Rows([4, 5])
    with pytest.raises(UlyssesError, match="document 1 of 5 tokens, for which lengths says 6"):
        SequenceShardSampler(rows, [4, 6], 10).packed[[0, 1]]
    # Padding that a row marks is not in the document.
    padded = [{"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0]}]
    assert SequenceShardSampler(padded, [2], 10).packed[[0]] == padded


def test_where_lengths_come_from() -> None:
    rows = [{"input_ids": [1] * n, "length": n, "text": "x" * 3 * n} for n in (3, 1, 2)]
    arrays: list[Any] = [(3, 1, 2), np.array([3, 1, 2]), torch.tensor([3, 1, 2])]
    sources = ["length", "input_ids", *arrays, lambda data: [len(row["text"]) // 3 for row in data]]
    for source in sources:
        assert SequenceShardSampler(rows, source, 5).lengths.tolist() == [3, 1, 2]
    with pytest.raises(UlyssesError, match=r"lengths='size' .* columns .'input_ids', 'length', 'text'"):
        SequenceShardSampler(rows, "size", 5)
    with pytest.raises(UlyssesError, match="lengths='size' for a list with no columns"):
        SequenceShardSampler([1, 2], "size", 5)
    with pytest.raises(UlyssesError, match="an empty dataset"):
        SequenceShardSampler([], "size", 5)
    with pytest.raises(UlyssesError, match="without a length"):
        SequenceShardSampler(iter([1]), [1], 5)


def test_columns_of_a_hugging_face_dataset() -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"input_ids": [[1] * n for n in (3, 1, 2)], "length": [3, 1, 2]}
    for data in (datasets.Dataset.from_dict(rows), datasets.Dataset.from_dict(rows).with_format("torch")):
        part = data.select([2, 0])
        for source in ("length", "input_ids"):
            one = SequenceShardSampler(part, source, 5)
            assert one.lengths.tolist() == [2, 3]
        assert [len(row["input_ids"]) for row in one.packed[[1, Piece(0, 1, 2)]]] == [3, 1]
        with pytest.raises(UlyssesError, match="lengths='size' for a Dataset"):
            SequenceShardSampler(part, "size", 5)
