"""What ``predict_step`` returns: sequences joined, whole tensors left alone, anything unclear warned of."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from models import LlamaModule, token_batch
from torch import Tensor

from lightning_ulysses import UlyssesError, gather_sequence
from lightning_ulysses.batch.predictions import join_outputs
from lightning_ulysses.context import LocalBatch
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.testing import SplitRun, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Case(NamedTuple):
    """One batch: sizes, and what a rank returns."""

    sp_size: int
    seq_len: int
    rows: int
    padding: int = 0

    @property
    def layout(self) -> SequenceLayout:
        return SequenceLayout(self.seq_len, self.sp_size, num_padding=self.padding)

    def whole(self, seed: int, *more: int) -> Tensor:
        """(B, S, ...)."""
        return numbers(seed, self.rows, self.seq_len, *more)

    def cut(self, whole: Tensor, rank: int, dim: int = 1) -> Tensor:
        return whole.narrow(dim, self.layout.starts[rank], self.layout.shares[rank])


Make = Callable[[Case, int], Any]


def try_all(rank: int, case: Case, outputs: dict[str, Make]) -> dict[str, tuple[Any, list[str]]]:
    """What comes of each output, or the message of the error, with the warnings."""
    dist.init_process_group("gloo", rank=rank, world_size=case.sp_size)
    mesh = SequenceMesh(rank, case.sp_size, case.sp_size, rank, 1, 0, dist.group.WORLD)
    found: dict[str, tuple[Any, list[str]]] = {}
    for name, make in outputs.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = join_outputs(make(case, rank), LocalBatch(case.layout, rows=case.rows), mesh)
            except UlyssesError as error:
                result = str(error)
        found[name] = result, [str(warning.message) for warning in caught]
    return found


class Pair(NamedTuple):
    first: Any
    second: Any


def nested(case: Case, rank: int) -> Any:
    ids = case.whole(2).argsort(-1)
    return {"a": [Pair(case.cut(case.whole(1, 5), rank), "text")], "b": (None, case.cut(ids, rank)), "c": 1.5}


def channels(case: Case, rank: int) -> Tensor:
    return case.cut(case.whole(1, 5), rank).transpose(1, 2)


def flat(case: Case, rank: int) -> Tensor:
    # (B, S_r, 5) -> (B * S_r, 5)
    return case.cut(case.whole(1, 5), rank).flatten(0, 1)


def first_row(case: Case, rank: int) -> Tensor:
    return case.cut(case.whole(1, 5), rank)[0]


def nearly_the_same(case: Case, rank: int) -> Tensor:
    """(B, S_r, 20000) that differs between ranks in its last number only."""
    tensor = numbers(1, case.rows, case.layout.shares[rank], 20000)
    tensor[-1, -1, -1] = rank
    return tensor


def nearly_whole(case: Case, rank: int) -> Tensor:
    """The same with channels first."""
    return nearly_the_same(case, rank).transpose(1, 2)


def same(case: Case, rank: int, *shape: int) -> Tensor:
    return numbers(3, *shape)


def pooled(case: Case, rank: int) -> Tensor:
    tensor = same(case, rank, case.rows, case.layout.shares[0])
    tensor[0, 0] = float("nan")
    return tensor


def channels_whole(case: Case, rank: int) -> Tensor:
    return same(case, rank, case.rows, 5, case.layout.shares[0])


def row_scores(case: Case, rank: int) -> Tensor:
    return same(case, rank, case.rows)


def periodic(case: Case, rank: int) -> Tensor:
    return torch.arange(case.layout.shares[0]).expand(case.rows, -1)


def ones(case: Case, rank: int) -> Tensor:
    return torch.ones(case.rows, case.layout.shares[rank])


def local(case: Case, rank: int) -> Any:
    return {"loss": torch.tensor(float(rank)), "some": torch.full((3 + rank, 2), rank), "n": torch.tensor(4)}


SEQUENCES: dict[str, Make] = {"nested": nested, "nearly the same": nearly_the_same}
ELSEWHERE: dict[str, Make] = {"channels": channels, "flat": flat, "first row": first_row}
SAME: dict[str, Make] = {
    "pooled": pooled,
    "channels, whole": channels_whole,
    "row scores": row_scores,
}


def check_sequences(case: Case, found: list[dict[str, tuple[Any, list[str]]]]) -> None:
    real = case.seq_len - case.padding
    for results in found:
        result, caught = results["nested"]
        assert not caught
        assert torch.equal(result["a"][0].first, case.whole(1, 5)[:, :real]) and result["a"][0].second == "text"
        assert result["b"][0] is None and torch.equal(result["b"][1], case.whole(2).argsort(-1)[:, :real])
        assert type(result["a"][0]) is Pair and result["c"] == 1.5
        parts = [nearly_the_same(case, rank) for rank in range(case.sp_size)]
        assert torch.equal(results["nearly the same"][0], torch.cat(parts, dim=1)[:, :real])


@pytest.mark.parametrize("case", [Case(2, 16, 2), Case(2, 16, 8), Case(3, 16, 2, padding=2), Case(3, 18, 3)])
def test_several_rows(pool: ProcessPool, case: Case) -> None:
    even = len(set(case.layout.shares)) == 1
    outputs = {**SEQUENCES, **ELSEWHERE, "local": local, "ones": ones}
    outputs |= {**SAME, "periodic": periodic, "nearly whole": nearly_whole} if even else {"row scores": row_scores}
    found = pool.run(try_all, case, outputs, world_size=case.sp_size)
    check_sequences(case, found)
    for rank, results in enumerate(found):
        for name in ELSEWHERE.keys() | ({"nearly whole"} if even else set()):
            result, caught = results[name]
            assert torch.equal(result, outputs[name](case, rank))
            assert len(caught) == (rank == 0)
            for part in ("differs between the ranks", "dimension 1", "gather_sequence(x, dim)"):
                assert all(part in text for text in caught), caught
        for name in SAME.keys() & results.keys():
            whole = SAME[name](case, rank)
            torch.testing.assert_close(results[name][0], whole, rtol=0, atol=0, equal_nan=True)
            assert not results[name][1]
        assert torch.equal(results["ones"][0], torch.ones(case.rows, case.seq_len - case.padding))
        own, caught = results["local"]
        assert float(own["loss"]) == rank and own["some"].shape == (3 + rank, 2) and int(own["n"]) == 4
        assert len(caught) == (rank == 0)
        assert all("['loss']" in text and "['some']" in text and "['n']" not in text for text in caught)
        if even:
            joined = periodic(case, rank).repeat(1, case.sp_size)
            assert torch.equal(results["periodic"][0], joined)
            for name in ("periodic", "ones"):
                assert len(results[name][1]) == (rank == 0) and all("x[None]" in text for text in results[name][1])


@pytest.mark.parametrize("case", [Case(2, 16, 1), Case(3, 16, 1, padding=2)])
def test_one_row_needs_no_dimension_of_its_own(pool: ProcessPool, case: Case) -> None:
    outputs = {**SEQUENCES, "channels": channels, "flat": flat}
    found = pool.run(try_all, case, outputs, world_size=case.sp_size)
    check_sequences(case, found)
    for rank, results in enumerate(found):
        assert torch.equal(results["flat"][0], case.whole(1, 5)[0, : case.seq_len - case.padding])
        assert torch.equal(results["channels"][0], channels(case, rank))
        assert all("gather_sequence(x, dim)" in text for text in results["channels"][1])


def names_differ(case: Case, rank: int) -> Any:
    return {"logits": ones(case, rank), f"rank{rank}": 1}


def one_more(case: Case, rank: int) -> Any:
    return [ones(case, rank)] * (1 + rank)


def dtypes_differ(case: Case, rank: int) -> Any:
    return {"best": ones(case, rank).to((torch.float32, torch.int64)[rank])}


def dims_differ(case: Case, rank: int) -> Any:
    return {"best": ones(case, rank)[(None,) * rank]}


def none_on_one(case: Case, rank: int) -> Any:
    return {"best": None if rank else ones(case, rank)}


def order_differs(case: Case, rank: int) -> Any:
    pairs = [("a", ones(case, rank)), ("b", ones(case, rank))]
    return dict(pairs[::-1] if rank else pairs)


DIFFERENT: dict[str, tuple[Make, str, str]] = {
    "names": (names_differ, "rank 0: output['rank0'], no tensor", "rank 1: output['rank1'], no tensor"),
    "one more": (one_more, "rank 0: nothing else", "rank 1: output[1] (2, 8) float32"),
    "dtypes": (dtypes_differ, "rank 0: output['best'] (2, 8) float32", "rank 1: output['best'] (2, 8) int64"),
    "dims": (dims_differ, "rank 0: output['best'] (2, 8) float32", "rank 1: output['best'] (1, 2, 8) float32"),
    "none": (none_on_one, "rank 0: output['best'] (2, 8) float32", "rank 1: output['best'], no tensor"),
    "order": (order_differs, "rank 0: nothing else", "the same order"),
}


def test_outputs_of_different_structure_are_refused_on_every_rank(pool: ProcessPool) -> None:
    outputs = {name: make for name, (make, *_) in DIFFERENT.items()}
    for results in pool.run(try_all, Case(2, 16, 2), outputs, world_size=2):
        for name, (_, *parts) in DIFFERENT.items():
            assert all(part in results[name][0] for part in parts), results[name][0]


class Embedding(LlamaModule):
    """Returns numbers of whole sequences besides those of tokens."""

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        hidden = self.model.model(input_ids=batch["input_ids"]).last_hidden_state
        # (B, S_r, D) -> (B, S, D) -> (B, D)
        pooled = gather_sequence(hidden).mean(1)
        return {"tokens": hidden, "pooled": pooled, "score": pooled.sum(1)}


# S_r is the hidden size in the first, and B in the second.
BATCHES = [token_batch(0, 64, 2), token_batch(1, 16, 8)]


def predict(rank: int) -> Any:
    run = SplitRun()
    return split_trainer(run).predict(Embedding(), split_loader(BATCHES, run, rank))


def test_whole_numbers_as_long_as_a_slice_stay_whole(pool: ProcessPool) -> None:
    module = Embedding().eval()
    for found in pool.run(predict, world_size=2):
        for batch, result in zip(BATCHES, found, strict=True):
            with torch.no_grad():
                wanted = module.predict_step(batch, 0)
            for name, value in wanted.items():
                torch.testing.assert_close(result[name], value, atol=1e-5, rtol=1e-4)


class Gathers(LlamaModule):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        found = super().predict_step(batch, batch_idx)
        return {**found, "gathered": [gather_sequence(found["logits"])]}


def predict_padded(rank: int, run: SplitRun, batch: Any) -> Any:
    return split_trainer(run).predict(Gathers(), split_loader([batch], run, rank))


@pytest.mark.parametrize("world", [1, 2])
def test_padding_is_cut_off(pool: ProcessPool, world: int) -> None:
    """Also where nothing is split."""
    batch = token_batch(0, 33, 2)
    wanted = LlamaModule().predict_step(batch, 0)
    run = SplitRun(world, world, {"pad_to_multiple_of": 16})
    for (found,) in pool.run(predict_padded, run, batch, world_size=world):
        assert found["name"] == "llama"
        assert torch.allclose(found["logits"], wanted["logits"], atol=1e-6)
        assert torch.allclose(found["gathered"][0], wanted["logits"], atol=1e-6)
        assert torch.equal(found["best"], wanted["best"])
