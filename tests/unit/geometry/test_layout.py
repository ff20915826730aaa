"""How sequences are cut, and where documents and padding lie, against brute force."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.documents import document_runs, sequences_without_cache, valid_runs
from lightning_ulysses.geometry.layout import Runs, SequenceLayout, cu_seqlens_to_runs, runs_from_starts

relaxed = settings(deadline=None, max_examples=150)
row_lengths = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def ids(runs: Runs, seq_len: int) -> list[int]:
    """The run that each token lies in, -1 for none."""
    return [next((i for i, (begin, end) in enumerate(runs) if begin <= t < end), -1) for t in range(seq_len)]


def ids_of_lengths(lengths: list[int]) -> list[int]:
    return [i for i, length in enumerate(lengths) for _ in range(length)]


def restarting(lengths: list[int]) -> list[int]:
    return [t for length in lengths for t in range(length)]


@st.composite
def packed_rows(draw: st.DrawFn) -> list[list[int]]:
    """Document lengths of up to three rows that are equally long."""
    rows = draw(st.lists(row_lengths, min_size=1, max_size=3))
    longest = max(sum(row) for row in rows)
    return [[*row, longest - sum(row)] if sum(row) < longest else row for row in rows]


@relaxed
@given(st.integers(1, 64), st.integers(1, 9))
def test_spans_cover_the_sequence(seq_len: int, sp_size: int) -> None:
    if seq_len < sp_size:
        with pytest.raises(UlyssesError, match=rf"{seq_len} tokens per row for sp_size={sp_size}"):
            SequenceLayout(seq_len, sp_size)
        return
    layout = SequenceLayout(seq_len, sp_size)
    tokens = [t for rank in range(sp_size) for t in range(seq_len)[layout.spans[rank]]]
    assert tokens == list(range(seq_len))
    assert max(layout.shares) - min(layout.shares) <= 1 and min(layout.shares) >= 1
    assert [layout.spans[rank].start for rank in range(sp_size)] == [layout.starts[rank] for rank in range(sp_size)]


@relaxed
@given(st.integers(1, 30), st.data())
def test_runs_from_starts(seq_len: int, data: st.DataObject) -> None:
    begins = data.draw(st.lists(st.integers(0, seq_len - 1)))
    runs = runs_from_starts(begins, seq_len)
    new = [t > 0 and t in begins for t in range(seq_len)]
    assert ids(runs, seq_len) == [sum(new[: t + 1]) for t in range(seq_len)]


@relaxed
@given(row_lengths, st.integers(0, 4), st.integers(0, 2))
def test_cu_seqlens(lengths: list[int], behind: int, repeats: int) -> None:
    """Empty documents do not count, and tokens behind the last one are a document of their own."""
    edges = [sum(lengths[:i]) for i in range(len(lengths) + 1)] + [sum(lengths)] * repeats
    seq_len = sum(lengths) + behind
    runs = cu_seqlens_to_runs(edges, seq_len)
    assert ids(runs, seq_len) == ids_of_lengths([*lengths, behind])
    assert document_runs({"cu_seqlens": torch.tensor(edges)}, None, 1, seq_len) == (runs,)


@pytest.mark.parametrize("edges", [[], [1, 4], [0, 5, 3], [0, 4, 9]])
def test_cu_seqlens_that_do_not_fit_are_refused(edges: list[int]) -> None:
    with pytest.raises(UlyssesError, match=rf"cu_seqlens \[{', '.join(map(str, edges))}\] for rows of 8 tokens"):
        cu_seqlens_to_runs(edges, 8)


@relaxed
@given(packed_rows(), st.integers(0, 7))
def test_documents_from_positions(rows: list[list[int]], offset: int) -> None:
    seq_len = sum(rows[0])
    positions = torch.tensor([restarting(lengths) for lengths in rows]) + offset
    if seq_len > 1 and all(length == 1 for lengths in rows for length in lengths):
        with pytest.raises(UlyssesError, match="every token is a document of its own"):
            document_runs({}, positions, len(rows), seq_len)
        return
    runs = document_runs({}, positions, len(rows), seq_len)
    if all(len(lengths) == 1 for lengths in rows):
        assert runs is None
        return
    assert runs is not None
    assert [ids(found, seq_len) for found in runs] == [ids_of_lengths(lengths) for lengths in rows]


def test_documents_of_one_token_behind_the_rest_of_another() -> None:
    positions = torch.tensor([[3, 4, 0, 0, 1]])
    assert document_runs({}, positions, 1, 5) == (((0, 2), (2, 3), (3, 5)),)


def padded_positions(lengths: list[int], gaps: list[int], fill: str) -> tuple[list[int], list[bool], list[int]]:
    """Positions, what is no padding, and where documents begin: documents with a gap of padding before each and behind.

    The padding's positions go on counting, stay as they are, or are 1, as they come from
    ``attention_mask.cumsum(-1) - 1`` and from a ``masked_fill`` of it.
    """
    positions: list[int] = []
    kept: list[bool] = []
    begins = [0]
    for length, gap in zip([*lengths, 0], gaps, strict=True):
        last = positions[-1] if positions else -1
        going_on = range(last + 1, last + 1 + gap)
        positions += {"counts": list(going_on), "stays": [last] * gap, "fixed": [1] * gap}[fill]
        kept += [False] * gap
        begins += [len(kept)] if length and any(kept) else []
        positions += range(length)
        kept += [True] * length
    return positions, kept, begins


@relaxed
@given(row_lengths, st.data(), st.sampled_from(["counts", "stays", "fixed"]))
def test_padding_is_no_document(lengths: list[int], data: st.DataObject, fill: str) -> None:
    # Documents of one token alone are refused.
    lengths = [*lengths, 2]
    gaps = data.draw(st.lists(st.integers(0, 4), min_size=len(lengths) + 1, max_size=len(lengths) + 1))
    positions, kept, begins = padded_positions(lengths, gaps, fill)
    seq_len = len(kept)
    for dtype in (torch.bool, torch.int64, torch.float32):
        mask = torch.tensor([kept]).to(dtype)
        found = document_runs({}, torch.tensor([positions]), 1, seq_len, mask)
        assert found == ((runs_from_starts(begins, seq_len),) if len(begins) > 1 else None)


@relaxed
@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=3), st.booleans())
def test_positions_that_go_on_over_padding_mark_no_documents(rows: list[list[bool]], counted: bool) -> None:
    """Whether padding is counted or not, and for any padding in between."""
    mask = torch.tensor(rows).long()
    positions = mask.cumsum(dim=1) - 1 if counted else torch.arange(9).expand(len(rows), 9)
    assert document_runs({}, positions, len(rows), 9, mask) is None
    assert document_runs({}, positions.masked_fill(mask == 0, 1), len(rows), 9, mask) is None


def test_jumps_ahead_are_no_documents_but_for_a_call_without_mask_and_cache() -> None:
    positions, mask = torch.tensor([[0, 0, 1, 9, 9, 10]]), torch.tensor([[0, 1, 1, 1, 0, 1]])
    assert document_runs({}, positions, 2, 6, mask) is None
    assert sequences_without_cache(positions, 2) == (((0, 1), (1, 3), (3, 4), (4, 6)),) * 2
    assert document_runs({}, torch.tensor([[2, 3, 40, 2, 2, 3]]), 1, 6) == (((0, 3), (3, 4), (4, 6)),)
    assert sequences_without_cache(torch.arange(7, 12), 3) is None


@pytest.mark.parametrize("mask", [None, torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])])
def test_positions_that_never_grow_are_refused(mask: Tensor | None) -> None:
    for positions in (torch.zeros(2, 5, dtype=torch.int64), torch.full((1, 5), 7)):
        with pytest.raises(UlyssesError, match=r"never grow .* leave position_ids out"):
            document_runs({}, positions, 2, 5, mask)
    # A row of padding beside another one does no harm.
    assert document_runs({}, torch.tensor([[0, 1, 2, 0, 1], [0] * 5]), 2, 5) is not None


def test_positions_shared_by_all_rows() -> None:
    shared = torch.tensor([[0, 1, 2, 0, 1]])
    for positions in (shared, shared[0]):
        assert document_runs({}, positions, 2, 5) == (((0, 3), (3, 5)),) * 2


def test_positions_of_several_axes_mark_no_documents() -> None:
    assert document_runs({}, torch.zeros(3, 2, 5, dtype=torch.int64), 2, 5) is None


def test_cu_seqlens_go_before_positions() -> None:
    entries = {"cu_seqlens": None, "cu_seq_lens_q": torch.tensor([0, 4, 5])}
    assert document_runs(entries, torch.tensor([[0, 1, 0, 1, 2]]), 1, 5) == (((0, 4), (4, 5)),)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_cu_seqlens_of_any_type(kind: Any) -> None:
    for key in ("cu_seqlens", "cu_seq_lens_q"):
        assert document_runs({key: kind([0, 4, 5])}, None, 1, 5) == (((0, 4), (4, 5)),)


@pytest.mark.parametrize(
    ("cu_seqlens", "rows", "parts"),
    [
        (torch.tensor([0, 4, 8]), 2, ("shape (3,) with 2 rows", "one row")),
        (torch.tensor([[0, 4, 8]]), 1, ("shape (1, 3)", "(documents + 1,)")),
        ([[0, 4, 8]], 1, ("shape (1, 3)", "a list")),
        ([0, 4, 8], 2, ("shape (3,) with 2 rows", "one row")),
        ([0.0, 4.0, 8.0], 1, ("torch.float32, a list", "integers")),
        (np.array([0.0, 8.0]), 1, ("torch.float64, a ndarray", "integers")),
        (torch.tensor([False, True]), 1, ("torch.bool", "integers")),
        ("048", 1, ("of type str", "integers")),
        ([[0, 4], [8]], 1, ("of type list", "integers")),
        (8, 1, ("shape ()", "integers")),
        ([0, 4, 9], 1, ("[0, 4, 9] for rows of 8 tokens",)),
    ],
)
def test_cu_seqlens_that_cannot_be_are_refused(cu_seqlens: Any, rows: int, parts: tuple[str, ...]) -> None:
    with pytest.raises(UlyssesError) as caught:
        document_runs({"cu_seqlens": cu_seqlens}, None, rows, 8)
    assert all(part in str(caught.value) for part in parts)


@relaxed
@given(st.integers(1, 3), st.integers(1, 12), st.data())
def test_valid_runs_are_what_the_mask_keeps(rows: int, seq_len: int, data: st.DataObject) -> None:
    bits = st.lists(st.booleans(), min_size=seq_len, max_size=seq_len)
    mask = torch.tensor(data.draw(st.lists(bits, min_size=rows, max_size=rows)))
    for dtype in (torch.bool, torch.int64, torch.float32):
        runs = valid_runs(mask.to(dtype))
        if mask.all():
            assert runs is None
            continue
        assert runs is not None
        for kept, found in zip(mask.tolist(), runs, strict=True):
            assert [number >= 0 for number in ids(found, seq_len)] == kept
            assert all(left[1] < right[0] for left, right in pairwise(found))


def test_no_mask_keeps_everything() -> None:
    assert valid_runs(None) is None
