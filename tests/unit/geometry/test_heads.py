"""Which rank computes which heads, over all head counts and group sizes."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.heads import HeadLayout, head_layout
from lightning_ulysses.geometry.shares import even_shares, starts


@st.composite
def head_layouts(draw: st.DrawFn) -> HeadLayout:
    kv_heads, group = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    return HeadLayout(kv_heads * group, kv_heads, draw(st.integers(1, min(kv_heads * group, 16))))


over_layouts = given(head_layouts())
relaxed = settings(deadline=None, max_examples=200)


@relaxed
@given(st.integers(0, 200), st.integers(1, 20))
def test_even_shares_add_up_and_differ_by_at_most_one(total: int, parts: int) -> None:
    shares = even_shares(total, parts)
    assert len(shares) == parts and sum(shares) == total
    assert max(shares) - min(shares) <= 1 and list(shares) == sorted(shares, reverse=True)
    assert starts(shares) == tuple(sum(shares[:part]) for part in range(parts))


@relaxed
@over_layouts
def test_every_query_head_is_on_exactly_one_rank(layout: HeadLayout) -> None:
    dealt = [head for begin, end in layout.query_ranges for head in range(begin, end)]
    assert dealt == list(range(layout.num_heads))
    counts = [end - begin for begin, end in layout.query_ranges]
    assert tuple(counts) == layout.query_shares
    assert min(counts) >= 1 and max(counts) - min(counts) <= 1


@relaxed
@over_layouts
@example(HeadLayout(9, 3, 2))
@example(HeadLayout(10, 5, 4))
@example(HeadLayout(4, 1, 4))
def test_each_rank_gets_the_key_value_heads_of_its_queries_and_no_others(layout: HeadLayout) -> None:
    for rank in range(layout.sp_size):
        needed = sorted({head // layout.group_size for head in range(*layout.query_ranges[rank])})
        assert list(range(*layout.kv_ranges[rank])) == needed


@relaxed
@over_layouts
def test_kv_index_points_at_the_key_value_head_of_each_query(layout: HeadLayout) -> None:
    for rank in range(layout.sp_size):
        index, first = layout.kv_index(rank), layout.kv_ranges[rank][0]
        assert [first + i for i in index] == [head // layout.group_size for head in range(*layout.query_ranges[rank])]


@relaxed
@over_layouts
@example(HeadLayout(9, 3, 2))
@example(HeadLayout(10, 5, 4))
def test_is_grouped_says_whether_repeating_each_head_gives_the_index(layout: HeadLayout) -> None:
    for rank in range(layout.sp_size):
        index = layout.kv_index(rank)
        begin, end = layout.kv_ranges[rank]
        per_head = len(index) / (end - begin)
        repeated = [head for head in range(end - begin) for _ in range(int(per_head))]
        assert (layout.uneven_groups[rank] is None) == (per_head.is_integer() and list(index) == repeated)


def test_known_layouts() -> None:
    uneven = HeadLayout(9, 3, 2)
    assert uneven.query_ranges == ((0, 5), (5, 9)) and uneven.kv_ranges == ((0, 2), (1, 3))
    assert uneven.kv_index(0) == (0, 0, 0, 1, 1) and uneven.uneven_groups[0] is not None
    assert uneven.kv_index(1) == (0, 1, 1, 1) and uneven.uneven_groups[1] is not None
    shared = HeadLayout(4, 1, 4)
    assert shared.kv_ranges == ((0, 1),) * 4 and all(shared.uneven_groups[rank] is None for rank in range(4))


def test_head_layout_is_made_once() -> None:
    assert head_layout(8, 2, 4) is head_layout(8, 2, 4)
    assert head_layout(8, 2, 4) == HeadLayout(8, 2, 4)


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ((4, 4, 5), ("sp_size=5", "4 query heads", "sp_size to at most 4")),
        ((9, 2, 3), ("9 query heads", "2 key/value heads", "multiple")),
        ((4, 0, 2), ("4 query heads", "0 key/value heads")),
    ],
)
def test_impossible_layouts_are_refused(sizes: tuple[int, int, int], parts: tuple[str, ...]) -> None:
    with pytest.raises(UlyssesError) as caught:
        HeadLayout(*sizes)
    assert all(part in str(caught.value) for part in parts)
