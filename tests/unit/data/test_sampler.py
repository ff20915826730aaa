"""Who gets which documents in which epoch."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from datasets import Dataset as HuggingFace
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from packs import every_token, lengths_of, ranks, sampler, tokens
from torch.utils.data import DataLoader, Dataset

from lightning_ulysses.context import SequenceContext, activate
from lightning_ulysses.data import PackingCollator, SequenceShardSampler
from lightning_ulysses.data.packing import Overlong, Pack
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.mesh import SequenceMesh


@pytest.fixture
def strategy() -> Iterator[Any]:
    """Stands in for a strategy that has set up ``world`` processes."""

    def start(rank: int, world: int, sp_size: int) -> None:
        mesh = SequenceMesh(rank, world, sp_size, rank % sp_size, world // sp_size, rank // sp_size)
        activate(SequenceContext(mesh))

    yield start
    activate(None)


@pytest.mark.filterwarnings("ignore:.*longer than max_tokens")
@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=80),
    st.integers(1, 6),
    st.sampled_from(["split", "truncate", "drop"]),
    st.integers(0, 3),
    st.booleans(),
)
def test_no_token_is_lost_doubled_or_moved(
    lengths: list[int], size: int, overlong: Overlong, epoch: int, shuffle: bool
) -> None:
    assume(overlong != "drop" or min(lengths) <= 40)
    group = ranks(size, lengths, max_tokens=40, overlong=overlong, shuffle=shuffle)
    plan = group[0]._plan
    if len(plan.pieces) < -(-plan.count // size) * size:
        with pytest.raises(UlyssesError, match="data-parallel ranks"):
            len(group[0])
        return
    for one in group:
        one.set_epoch(epoch)
    packs = [list(one) for one in group]
    assert {len(mine) for mine in packs} == {len(one) for one in group} and len(packs[0]) > 0
    everything = [pack for mine in packs for pack in mine]
    assert all(0 < sum(tokens([pack], lengths).values()) <= 40 for pack in everything)
    kept = [0 if overlong == "drop" and length > 40 else length for length in lengths]
    wanted = every_token(kept, 40 if overlong == "truncate" else 90)
    assert tokens(everything, lengths) == wanted


def test_epochs() -> None:
    lengths = lengths_of(300)
    one = sampler(lengths)
    zero = list(one)
    assert list(one) == zero
    one.set_epoch(1)
    other = list(one)
    assert other != zero and len(other) == len(zero)
    assert list(sampler(lengths, seed=1)) != zero
    still = sampler(lengths, shuffle=False)
    before = list(still)
    still.set_epoch(1)
    assert list(still) == before


def test_ranks_come_from_the_strategy_once_there_is_one(strategy: Any) -> None:
    lengths = lengths_of(300)
    one = sampler(lengths, place=None)
    alone = len(one)
    packs = {}
    for rank in range(4):
        strategy(rank, 4, 2)
        packs[rank] = list(one)
        assert (one.num_replicas, one.rank) == (2, rank // 2)
        assert (one.num_samples, one.total_size) == (len(one), 2 * len(one))
    assert packs[0] == packs[1] and packs[2] == packs[3]
    assert len(packs[0]) == len(packs[2]) == -(-alone // 2)
    assert tokens(packs[0] + packs[2], lengths) == every_token(lengths)


def test_ranks_of_the_process_group(pool: Any) -> None:
    packs = pool.run(in_a_process_group, world_size=2)
    lengths = lengths_of(60)
    assert len(packs[0]) == len(packs[1])
    assert tokens(packs[0] + packs[1], lengths) == every_token(lengths)


def in_a_process_group(rank: int) -> Any:
    one = sampler(lengths_of(60), place=None)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    return list(one)


def test_places_that_cannot_be(strategy: Any) -> None:
    for place in ({"num_replicas": 2}, {"rank": 1}, {"num_replicas": 2, "rank": 2}, {"num_replicas": 2, "rank": -1}):
        with pytest.raises(UlyssesError, match="both or neither"):
            sampler([1, 2], place=None, **place)
    strategy(1, 4, 2)
    with pytest.raises(UlyssesError, match="data-parallel rank 0 of 2"):
        len(sampler(lengths_of(50), place=(4, 1)))
    assert len(sampler(lengths_of(50), place=(2, 0)))
    with pytest.raises(UlyssesError, match="max_tokens=1 with sp_size=2"):
        next(iter(sampler([1] * 9, max_tokens=1, place=None)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": 2.0}, "max_tokens=2.0"),
        ({"max_tokens": 2**31}, "max_tokens=2147483648"),
        ({"window": 1}, "window=1"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": True}, "seed=True"),
        ({"max_tokens": 30}, "document 1 of 50 tokens"),
        ({"cost": {"per_token": 1}}, r"cost=\{'per_token': 1\}.*CostModel\(per_token"),
        ({"overlong": "cut"}, "overlong='cut'"),
    ],
)
def test_settings_that_cannot_be(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UlyssesError, match=words):
        sampler([10, 50, 20], **arguments)


def test_ranks_without_a_pack() -> None:
    for drop_last in (False, True):
        with pytest.raises(UlyssesError, match="2 packs of 2 documents for 3 data-parallel ranks"):
            len(sampler([60, 60], place=(3, 0), drop_last=drop_last))
    assert [len(one) for one in ranks(3, [60, 50, 9], drop_last=False)] == [1, 1, 1]


def test_lost_documents_are_reported() -> None:
    with pytest.warns(UserWarning, match="2 of 4 documents .* loses 27 of 34 tokens"):
        report = sampler([3, 12, 15, 4], max_tokens=10, overlong="drop").report()
    assert (report.documents, report.overlong, report.tokens, report.lost_tokens) == (4, 2, 7, 27)


class Rows(Dataset[Any]):
    """Asks a list for one row."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)


UNPACKED: dict[str, Any] = {
    "list": lambda documents: documents,
    "dataset": Rows,
    "hugging face": HuggingFace.from_list,
}


@pytest.mark.parametrize("rows_per_batch", [None, 2])
@pytest.mark.parametrize("kind", UNPACKED)
def test_documents_in_the_place_of_packs(kind: str, rows_per_batch: int | None) -> None:
    documents = [{"input_ids": [number] * 20} for number in range(9)]
    one = SequenceShardSampler(documents, "input_ids", 64)
    dataset = UNPACKED[kind](documents)
    loader = DataLoader(dataset, sampler=one, batch_size=rows_per_batch, collate_fn=PackingCollator())
    with pytest.raises(UlyssesError, match=r"give the DataLoader sampler\.packed as its dataset"):
        next(iter(loader))


def test_a_part_of_a_document_is_no_number() -> None:
    one = SequenceShardSampler([[1] * 50], [50], 30, overlong="split")
    with pytest.raises(UlyssesError, match=r"asked for tokens \d+ to \d+ of document 0.*sampler.packed"):
        next(iter(DataLoader([[1] * 50], batch_sampler=one, collate_fn=PackingCollator())))  # type: ignore[arg-type]


def test_arrays_take_a_pack_as_numbers() -> None:
    pack = next(iter(sampler([20] * 9)))
    assert type(pack) is Pack and pack == list(pack) and len(pack) == 5
    assert np.arange(9)[pack].tolist() == torch.arange(9)[pack].tolist() == list(pack)
    assert type(pickle.loads(pickle.dumps(pack))) is Pack


def test_samplers_can_be_pickled() -> None:
    one = sampler(lengths_of(50))
    list(one)
    assert list(pickle.loads(pickle.dumps(one))) == list(one)
