"""Which packs make up a step, and what they cost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from packs import Lengths, as_lists, lists, long_tailed, relaxed, shuffled

from lightning_ulysses.cost.model import CostModel
from lightning_ulysses.data.balance import deal, divide, imbalance, pack_costs, widen
from lightning_ulysses.data.packing import best_fit, group, random_order
from lightning_ulysses.errors import UlyssesError


def test_cost_follows_the_model() -> None:
    config = SimpleNamespace(
        hidden_size=8, num_hidden_layers=3, num_attention_heads=4, vocab_size=50, num_key_value_heads=2, head_dim=16
    )
    model = CostModel.from_config(config)
    q_and_o, k_and_v, mlp = 2 * 8 * 64, 2 * 8 * 32, 3 * 8 * 32
    assert model.per_token == 2 * (3 * (q_and_o + k_and_v + mlp) + 8 * 50)
    assert model.per_pair == 3 * 2 * 64
    assert CostModel.from_config(config, causal=False).per_pair == 2 * model.per_pair
    packs = group(np.array([0, 1, 2]), np.array([0, 0, 1]))
    assert pack_costs(packs, np.array([4, 5, 6]), CostModel(2, 3)).tolist() == [2 * 9 + 3 * 41, 2 * 6 + 3 * 36]


def test_cost_of_a_transformers_config() -> None:
    transformers = pytest.importorskip("transformers")
    model = CostModel.from_config(transformers.GPT2Config())
    parameters = 12 * (4 + 12) * 768**2 + 768 * 50257
    assert model == CostModel(2 * parameters, 2 * 12 * 768)


@pytest.mark.parametrize("costs", [(-1.0, 1.0), (0.0, 0.0), (float("inf"), 1.0), ("1", 1.0)])
def test_costs_that_cannot_be(costs: Any) -> None:
    with pytest.raises(UlyssesError, match="cost model"):
        CostModel(*costs)
    with pytest.raises(UlyssesError, match="vocab_size"):
        CostModel.from_config(SimpleNamespace(hidden_size=8, num_hidden_layers=3, num_attention_heads=4))


@relaxed
@given(lists, st.integers(0, 200))
def test_widen_divides_at_document_boundaries(lengths: Lengths, extra: int) -> None:
    array = np.array(lengths)
    packs = shuffled(array, 150)
    wider = widen(packs, len(packs) + extra)
    assert len(wider) == min(len(packs) + extra, len(array))
    assert sorted(wider.members.tolist()) == list(range(len(array))) and wider.sizes.min() > 0
    home = {piece: number for number, pack in enumerate(as_lists(packs)) for piece in pack}
    assert all(len({home[piece] for piece in pack}) == 1 for pack in as_lists(wider))


def test_divided_packs_are_alike() -> None:
    packs = group(np.arange(9), np.array([0] * 8 + [1]))
    divided, origin = divide(packs, np.array([0]), 4)
    assert origin.tolist() == [1, 0, 0, 0, 0]
    assert sorted(as_lists(divided)) == [[0, 4], [1, 5], [2, 6], [3, 7], [8]]


@relaxed
@given(lists, st.integers(1, 9), st.booleans(), st.one_of(st.none(), st.integers(0, 9)), st.data())
def test_dealt_packs_go_round_and_none_is_lost(
    lengths: Lengths, ranks: int, drop_last: bool, seed: int | None, data: st.DataObject
) -> None:
    array = np.array(lengths)
    packs = shuffled(array, 150)
    key = None if seed is None else (seed,)
    try:
        slots = (len(packs) if drop_last else len(packs) + ranks - 1) // ranks * ranks
        dealt = deal(packs, array, CostModel(), ranks, slots, key=key)
    except UlyssesError:
        assert not drop_last and len(array) < -(-len(packs) // ranks) * ranks
        return
    assert dealt.steps.shape == (len(packs) // ranks if drop_last else -(-len(packs) // ranks), ranks)
    assert len(dealt.left_out) == (len(packs) % ranks if drop_last else 0)
    numbers = [*dealt.steps.ravel().tolist(), *dealt.left_out.tolist()]
    assert sorted(numbers) == list(range(len(dealt.packs)))
    assert sorted(dealt.packs.members.tolist()) == list(range(len(array)))
    used = data.draw(st.integers(0, len(dealt.steps))) * ranks
    if used == len(numbers):
        return
    rest = dealt.rest(used)
    before = [piece for number in numbers[:used] for piece in dealt.packs[number]]
    assert sorted([*before, *rest.members]) == list(range(len(array)))
    assert len(rest) <= len(numbers) - used
    assert rest.sums(array).max() <= 150


def test_a_divided_pack_is_joined_again() -> None:
    array = np.array([5, 4, 3, 2, 1])
    packs = best_fit(array, np.arange(5), 15, 64)
    dealt = deal(packs, array, CostModel(), 4, -(-len(packs) // 4) * 4, key=None)
    assert len(packs) == 1 and dealt.steps.shape == (1, 4)
    assert as_lists(dealt.rest(0)) == [[0, 1, 2, 3, 4]] or sorted(dealt.rest(0)[0].tolist()) == [0, 1, 2, 3, 4]
    assert len(dealt.rest(0)) == 1


@pytest.mark.parametrize(("ranks", "words"), [(4, "at least one pack for each rank"), (2, "set drop_last=True")])
def test_packs_that_do_not_go_round(ranks: int, words: str) -> None:
    array = np.array([9, 9, 9])
    with pytest.raises(UlyssesError, match=words):
        deal(best_fit(array, np.arange(3), 10, 64), array, CostModel(), ranks, 4, key=None)


@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_of_a_step_cost_the_same(shuffle: bool) -> None:
    lengths = np.minimum(long_tailed(40_000), 4000)
    packs = shuffled(lengths, 4000)
    cost = CostModel(1, 1e-3)
    dealt = deal(packs, lengths, cost, 8, len(packs) // 8 * 8, key=(0,) if shuffle else None)
    costs = pack_costs(packs, lengths, cost)
    naive = imbalance(costs[random_order(len(packs), 1)[: len(packs) // 8 * 8]].reshape(-1, 8))
    assert imbalance(costs[dealt.steps]) < 1.01 < 1.1 < naive
    # The dearest of a step is no matter of the rank, and a step's cost none of its time.
    if shuffle:
        dearest = np.bincount(costs[dealt.steps].argmax(axis=1), minlength=8)
        assert dearest.min() > 0.4 * dearest.mean()
        of_steps = costs[dealt.steps].mean(axis=1)
        assert abs(np.corrcoef(of_steps[1:], of_steps[:-1])[0, 1]) < 0.15


def test_imbalance_is_waiting_time() -> None:
    assert imbalance(np.array([[1.0, 3.0], [2.0, 2.0]])) == pytest.approx(5 / 4)
