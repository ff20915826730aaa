"""Who attends with which queries where ranks hold the same heads."""

from __future__ import annotations

import pytest

from lightning_ulysses.exchange.mesh import MeshSizes, SequenceMesh, resolve_sizes
from lightning_ulysses.geometry.query_runs import QueryRuns, most_ulysses, query_runs
from lightning_ulysses.geometry.shares import even_shares


def cost(runs: tuple[tuple[int, int], ...]) -> int:
    """Keys that causal queries see."""
    return sum(query + 1 for begin, end in runs for query in range(begin, end))


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("is_balanced", [False, True])
def test_every_query_has_one_rank(ranks: int, is_balanced: bool) -> None:
    for total in (2 * ranks, 2 * ranks + 1, 67):
        queries = QueryRuns(even_shares(total, ranks), is_balanced)
        runs = [run for rank in range(ranks) for run in queries.of(rank)]
        assert sorted(query for begin, end in runs for query in range(begin, end)) == list(range(total))
        assert all(begin < end for begin, end in runs)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_pairs_of_parts_cost_the_same(ranks: int) -> None:
    costs = [cost(query_runs((128,) * ranks, True).of(rank)) for rank in range(ranks)]
    assert len(set(costs)) == 1
    # The negative control: consecutive tokens cost (2 R - 1) / R times the mean on the last rank.
    costs = [cost(query_runs((128,) * ranks, False).of(rank)) for rank in range(ranks)]
    assert max(costs) * ranks / sum(costs) == pytest.approx((2 * ranks - 1) / ranks, rel=0.01)


def test_a_single_token_is_not_halved() -> None:
    assert query_runs((2, 1), True).of(0) == ((0, 2),)


@pytest.mark.parametrize(
    ("heads", "most", "size"), [(32, 8, 8), (3, 4, 2), (1, 4, 1), (2, 3, 1), (9, 8, 8), (4, 7, 1), (12, 16, 8)]
)
def test_ranks_that_exchange_heads(heads: int, most: int, size: int) -> None:
    assert most_ulysses(heads, most) == size


def test_sizes_by_hand() -> None:
    assert resolve_sizes(16, 8, {"ulysses": 2, "gather": 4}, None) == MeshSizes(8, 2, 2)
    mesh = SequenceMesh(0, 8, 8, 0, 1, 0, ulysses=2)
    # With fewer heads, fewer ranks exchange them.
    assert [mesh.head_ranks(heads) for heads in (32, 2, 1)] == [2, 2, 1]
    assert SequenceMesh(0, 8, 8, 0, 1, 0).head_ranks(6) == 4
