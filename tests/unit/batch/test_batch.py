"""Which tensors of a batch are sequences, and what each rank gets of them."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict, namedtuple
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ulysses.batch.excerpt import excerpt, excerpts, most_filled
from lightning_ulysses.batch.whole import read_batch
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.batch_keys import BatchRules

S, P = 11, 3


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


Named = namedtuple("Named", ["tokens", "name", "targets"])


def ids(rows: int = 2, seq_len: int = S, seed: int = 0) -> Tensor:
    return torch.randint(0, 50, (rows, seq_len), generator=torch.Generator().manual_seed(seed))


def labels(rows: int = 2, seq_len: int = S) -> Tensor:
    target = ids(rows, seq_len, 1)
    target[:, :3] = -100
    return target


def rules(pad: int | None = None, **dims: int | None) -> BatchRules:
    return BatchRules({key.removeprefix("_"): dim for key, dim in dims.items()}, pad)


def shards(batch: Any, reading: BatchRules | None = None, sp_size: int = P) -> list[Any]:
    whole = read_batch(batch, reading or BatchRules(), sp_size)
    return [whole.shard(rank)[0] for rank in range(sp_size)]


def joined(parts: list[Any], key: Any, dim: int = 1) -> Tensor:
    return torch.cat([part[key] for part in parts], dim=dim)


def encoding(data: dict[str, Any]) -> Any:
    from transformers import BatchEncoding

    return BatchEncoding(data)


MAPPINGS = {"dict": dict, "OrderedDict": OrderedDict, "UserDict": UserDict, "BatchEncoding": encoding}


@pytest.mark.parametrize("kind", MAPPINGS)
def test_mappings_keep_their_type_and_other_entries(kind: str) -> None:
    other = torch.rand(2, 4)
    data = {
        "input_ids": ids(),
        "labels": labels(),
        "name": "a",
        "extra": other,
        "length": torch.tensor(7),
        "nested": {"x": other},
    }
    batch = MAPPINGS[kind](dict(data))
    parts = shards(batch)
    for part in parts:
        assert type(part) is type(batch) and part is not batch
        assert list(part) == [*data, "shift_labels"]
        assert part["name"] == "a" and part["extra"] is other and part["nested"]["x"] is other
        assert part["length"] == 7
    assert [part["input_ids"].shape[1] for part in parts] == [4, 4, 3]
    for key in ("input_ids", "labels"):
        assert torch.equal(joined(parts, key), data[key])


def test_a_read_only_mapping_becomes_a_dict() -> None:
    part = shards(MappingProxyType({"input_ids": ids(), "name": "a"}))[1]
    assert type(part) is dict and part["name"] == "a" and torch.equal(part["input_ids"], ids()[:, 4:8])


def test_every_usual_key_is_cut() -> None:
    keys = ["input_ids", "labels", "shift_labels", "position_ids", "attention_mask", "token_type_ids", "loss_mask"]
    batch = {key: ids(seed=seed).clamp_min(1) for seed, key in enumerate(keys)}
    batch["attention_mask"] = torch.ones_like(ids())
    whole = {"cu_seqlens": None, "cu_seq_lens_k": torch.arange(S), "max_length_q": torch.tensor(S)}
    parts = shards({**batch, **whole})
    for key, tensor in batch.items():
        assert torch.equal(joined(parts, key), tensor), key
    assert all(part[key] is value for part in parts for key, value in whole.items())


@pytest.mark.parametrize("batch", [(ids(), labels()), [ids(), labels()], Pair(ids(), labels())])
def test_pairs(batch: Any) -> None:
    whole = read_batch(batch, BatchRules(), P)
    parts = [whole.shard(rank)[0] for rank in range(P)]
    assert all(type(part) is type(batch) for part in parts)
    assert torch.equal(joined(parts, 0), batch[0]) and torch.equal(joined(parts, 1), batch[1])
    # The pair's second part is already shifted, by convention.
    assert whole.counts == {"1": (2.0, 8.0, 6.0), "tokens": (8.0, 8.0, 6.0)}


def test_pairs_of_floats_have_only_tokens_to_count() -> None:
    batch = (torch.rand(2, S), torch.rand(2, S))
    assert read_batch(batch, BatchRules(), P).counts == {"tokens": (8.0, 8.0, 6.0)}
    assert torch.equal(joined(shards(batch), 1), batch[1])


def test_bare_tensors() -> None:
    tokens = ids()
    parts = shards(tokens)
    assert torch.equal(torch.cat(parts, dim=1), tokens)
    assert torch.equal(torch.cat([part[0] for part in shards([tokens])], dim=1), tokens)
    features = torch.rand(2, 5, S)
    assert torch.equal(torch.cat(shards(features, rules(batch=-1)), dim=2), features)


def test_named_tuple_with_other_entries() -> None:
    batch = Named(ids(), "a", labels())
    whole = read_batch(batch, rules(_0=1, _2=1), P)
    parts = [whole.shard(rank)[0] for rank in range(P)]
    assert all(type(part) is Named and part.name == "a" for part in parts)
    assert torch.equal(joined(parts, 2), batch.targets)
    assert whole.counts["2"] == (2.0, 8.0, 6.0)


def test_sequence_dims() -> None:
    batch = {"signal": torch.rand(2, S, 5), "time": torch.rand(S), "map": torch.rand(S, S), "target": labels()}
    whole = read_batch(batch, rules(signal=-2, time=0, map=None, target=-1), P)
    parts = [whole.shard(rank)[0] for rank in range(P)]
    assert torch.equal(joined(parts, "signal"), batch["signal"]) and parts[2]["signal"].shape == (2, 3, 5)
    assert torch.equal(joined(parts, "time", 0), batch["time"])
    assert all(part["map"] is batch["map"] for part in parts)
    assert whole.dims == {"signal": 1, "time": 0, "target": 1} and whole.rows == 2
    assert whole.counts == {"target": (2.0, 8.0, 6.0), "tokens": (8.0, 8.0, 6.0)}
    assert all(tensor.is_contiguous() for part in parts for tensor in part.values())


def test_rows_are_those_of_tensors_that_begin_with_them() -> None:
    positions = torch.arange(S).expand(3, 1, S)
    batch = {"input_ids": ids(1), "position_ids": positions, "cu_seqlens": torch.tensor([0, 4, S])}
    whole = read_batch(batch, rules(position_ids=2), P)
    assert whole.rows == 1 and whole.counts["tokens"] == (4.0, 4.0, 3.0)
    assert torch.equal(joined([whole.shard(rank)[0] for rank in range(P)], "position_ids", 2), positions)
    assert read_batch({"signal": torch.rand(2, 5, S)}, rules(signal=2), P).rows == 2
    assert read_batch({"signal": torch.rand(S, 5)}, rules(signal=0), P).rows == 1


def test_sequence_dims_take_usual_keys_out_and_add_others() -> None:
    batch = {"input_ids": ids(), "token_type_ids": torch.ones(2, 4).long(), "speaker": ids()}
    part = shards(batch, rules(token_type_ids=None, speaker=1))[1]
    assert part["token_type_ids"] is batch["token_type_ids"]
    assert torch.equal(part["speaker"], batch["speaker"][:, 4:8])


def shifted(tensor: Tensor, ends: list[int], fill: int = -100) -> Tensor:
    result = F.pad(tensor[:, 1:], (0, 1), value=fill)
    result[:, ends] = fill
    return result


def test_labels_are_shifted_before_the_cut() -> None:
    batch = {"input_ids": ids(), "labels": labels()}
    parts = shards(batch)
    assert torch.equal(joined(parts, "shift_labels"), shifted(batch["labels"], [S - 1]))
    assert torch.equal(joined(parts, "labels"), batch["labels"])


DOCUMENTS = {
    "positions": {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4]])},
    "positions without rows": {"position_ids": torch.tensor([0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4])},
    "cu_seqlens": {"cu_seqlens": torch.tensor([0, 4, 6, 11])},
    "transformers": {"cu_seq_lens_q": torch.tensor([0, 4, 6, 11], dtype=torch.int32)},
    "list": {"cu_seqlens": [0, 4, 6, 11]},
    "tuple": {"cu_seq_lens_q": (0, 4, 6, 11)},
    "array": {"cu_seqlens": np.array([0, 4, 6, 11], dtype=np.int32)},
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_the_last_token_of_a_document_has_no_target(kind: str) -> None:
    batch = {"input_ids": ids(1), "labels": ids(1), "loss_mask": torch.ones(1, S).long(), **DOCUMENTS[kind]}
    whole = read_batch(batch, BatchRules(), P)
    parts = [whole.shard(rank)[0] for rank in range(P)]
    assert whole.layout.documents == (((0, 4), (4, 6), (6, 11)),)
    assert torch.equal(joined(parts, "shift_labels"), shifted(batch["labels"], [3, 5, 10]))
    assert torch.equal(joined(parts, "shift_loss_mask"), shifted(batch["loss_mask"], [3, 5, 10], 0))
    assert whole.counts["shift_labels"] == (3.0, 3.0, 2.0) == whole.counts["shift_loss_mask"]
    assert whole.counts["labels"] == (4.0, 4.0, 3.0) == whole.counts["tokens"]


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_an_excerpt_cuts_documents_of_any_type(kind: Any) -> None:
    batch = {"input_ids": ids(1), "cu_seqlens": kind([0, 4, 6, 11])}
    cut = excerpt(batch, BatchRules(), (3, 5))
    assert read_batch(cut, BatchRules(), 1).layout.documents == (((0, 1), (1, 3), (3, 5)),)


@pytest.mark.parametrize("key", ["position_ids", "loss_mask", "attention_mask", "labels"])
@pytest.mark.parametrize("kind", [np.array, list, lambda rows: list(torch.tensor(rows))])
def test_sequences_that_are_no_tensors_are_refused(key: str, kind: Any) -> None:
    batch = {"input_ids": ids(1), key: kind([[1] * S])}
    with pytest.raises(UlyssesError, match=rf"batch\['{key}'\], a .* of numbers"):
        read_batch(batch, BatchRules(), P)
    # What is said to carry no sequence, and what holds no numbers, stays as it is.
    assert read_batch(batch, rules(**{key: None}), P).dims == {"input_ids": 1, "shift_input_ids": 1}
    assert "labels" not in read_batch({"input_ids": ids(1), "labels": ["cat"]}, BatchRules(), P).dims


def test_labels_shifted_by_the_user_are_left_alone() -> None:
    batch = {"input_ids": ids(), "shift_labels": labels(), "loss_mask": torch.ones(2, S).long()}
    whole = read_batch(batch, BatchRules(), P)
    assert set(whole.tensors) == set(batch) and torch.equal(whole.tensors["shift_labels"], batch["shift_labels"])
    assert whole.counts["shift_labels"] == (2.0, 8.0, 6.0)


def test_inputs_stand_in_for_labels_without_the_module_seeing_it() -> None:
    tokens = ids()
    whole = read_batch({"input_ids": tokens}, BatchRules(), P)
    part, slices, _ = whole.shard(1)
    assert set(part) == {"input_ids"} and whole.hidden == {"shift_input_ids"}
    assert torch.equal(slices["shift_input_ids"], tokens[:, 5:9])
    assert whole.counts["shift_input_ids"] == (8.0, 8.0, 4.0)


def test_counts_of_masks_are_their_sums() -> None:
    mask = torch.rand(2, S)
    whole = read_batch({"input_ids": ids(), "labels": ids(), "loss_mask": mask}, BatchRules(), P)
    wanted = [float(mask[:, begin:end].double().sum()) for begin, end in ((0, 4), (4, 8), (8, 11))]
    assert whole.counts["loss_mask"] == pytest.approx(wanted)
    assert whole.counts_of_group()["loss_mask"] == pytest.approx(float(mask.double().sum()))


def test_shared_positions_tell_documents_apart_where_a_plan_keeps_all() -> None:
    tokens = torch.arange(6)[None]
    batch = {"input_ids": tokens, "labels": tokens, "position_ids": torch.tensor([0, 1, 2, 0, 1, 2])}
    whole = read_batch(batch, BatchRules(keeps_all=True), P)
    assert whole.layout.documents == (((0, 3), (3, 6)),)
    assert whole.tensors["shift_labels"].tolist() == [[1, 2, -100, 4, 5, -100]]
    assert excerpt(batch, BatchRules(keeps_all=True), (2, 3))["position_ids"].tolist() == [2, 0, 1]


def test_classes_of_samples_are_counted_where_a_plan_keeps_all() -> None:
    batch = {"images": torch.zeros(4, 3, 8, 8), "labels": torch.tensor([1, -100, 0, 2]), "weight": torch.ones(4)}
    whole = read_batch(batch, BatchRules(keeps_all=True), P)
    assert whole.counts_of_group() == {"labels": 3, "tokens": 4}
    assert sum(whole.counts_of_rank(rank)["labels"] for rank in range(P)) == pytest.approx(3)
    part, _, seen = whole.shard(1)
    assert seen == {"labels": 3, "tokens": 4} and part["images"].shape == (4, 3, 8, 8)
    text = read_batch({"input_ids": ids(), "labels": torch.tensor([1, 0])}, BatchRules(keeps_all=True), P)
    assert text.counts_of_group() == {"shift_input_ids": 20, "labels": 2, "tokens": 22}


def test_another_ignore_index() -> None:
    batch = {"input_ids": ids(), "labels": labels().masked_fill(labels() == -100, -1)}
    whole = read_batch(batch, BatchRules(ignore_index=-1), P)
    assert whole.counts["labels"] == (2.0, 8.0, 6.0)
    assert (whole.tensors["shift_labels"][:, -1] == -1).all()


def test_padding_to_a_multiple() -> None:
    batch = {
        "input_ids": ids(),
        "labels": ids(seed=1),
        "position_ids": torch.arange(S).repeat(2, 1),
        "attention_mask": torch.ones(2, S).long(),
        "token_type_ids": torch.ones(2, S).long(),
        "loss_mask": torch.ones(2, S).long(),
        "weights": torch.rand(2, S, 3),
        "extra_targets": ids(seed=2),
    }
    whole = read_batch(batch, rules(8, weights=1, extra_targets=1), P)
    assert (whole.layout.seq_len, whole.layout.num_padding) == (16, 5)
    fills = {"labels": -100, "shift_labels": -100, "extra_targets": -100}
    for key, tensor in whole.tensors.items():
        assert tensor.shape[1] == 16
        if key == "position_ids":
            assert torch.equal(tensor, torch.arange(16).repeat(2, 1))
        else:
            assert (tensor[:, S:] == fills.get(key, 0)).all(), key
    # The padding joins the last document and is dropped by the user's own mask, but is no target.
    assert whole.layout.documents is None and whole.layout.valid == (((0, S),),) * 2
    group = whole.counts_of_group()
    assert group == {"labels": 22, "shift_labels": 20, "loss_mask": 22, "shift_loss_mask": 20, "extra_targets": 22}
    assert all(torch.equal(value, whole.tensors[key][:, :S]) for key, value in batch.items())


def test_padding_of_inputs_pairs_and_documents() -> None:
    whole = read_batch({"input_ids": ids()}, rules(16), P)
    assert (whole.tensors["shift_input_ids"][:, S - 1 :] == -100).all()
    assert whole.counts_of_group() == {"shift_input_ids": 20}
    pair = read_batch((ids(), labels()), rules(16), P)
    assert (pair.tensors["1"][:, S:] == -100).all()
    assert pair.counts_of_group() == {"1": 16}
    packed = {"input_ids": ids(1), "labels": ids(1), "cu_seqlens": torch.tensor([0, 4, S])}
    assert read_batch(packed, rules(16), P).layout.documents == (((0, 4), (4, S), (S, 16)),)
    assert read_batch(packed, rules(S), P).layout.num_padding == 0


def test_a_slice_without_targets_gets_one_that_does_not_count() -> None:
    target, mask = labels(), torch.ones(2, S).long()
    target[:, :5], mask[:, :5] = -100, 0
    batch = {"input_ids": ids(), "labels": target, "loss_mask": mask}
    whole = read_batch(batch, BatchRules(), P)
    part, _, seen = whole.shard(0, stand_in=True)
    # The label behind the cut belongs to the next rank's first token, and shifted to this rank's last.
    assert whole.counts["labels"][0] == 0 == whole.counts["shift_labels"][0]
    assert seen == {"labels": 1, "shift_labels": 1, "loss_mask": 1, "shift_loss_mask": 1, "tokens": 8}
    for key, ignored in (("labels", -100), ("shift_labels", -100), ("loss_mask", 0), ("shift_loss_mask", 0)):
        assert int((part[key] != ignored).sum()) == 1, key
    assert (whole.shard(0)[0]["labels"] == -100).all() and whole.shard(0)[2]["labels"] == 0
    assert whole.shard(1, stand_in=True)[2] == {name: values[1] for name, values in whole.counts.items()}


@pytest.mark.parametrize("pad", [None, 16])
@pytest.mark.parametrize("rows", [1, 2])
def test_batches_are_never_changed_in_place(pad: int | None, rows: int) -> None:
    target = labels(rows)
    # Ranks 0 and 2 get a stand-in target; a slice of a single row is a view of it.
    target[:, [0, 1, 2, 3, 8, 9, 10]] = -100
    data = {"input_ids": ids(rows), "labels": target, "loss_mask": torch.zeros(rows, S).long(), "name": "a"}
    pair = (data["input_ids"], target)
    for batch in (data, UserDict(data), encoding(data), pair, list(pair), Pair(*pair)):
        before = copy.deepcopy(batch)
        for rank in range(P):
            read_batch(batch, rules(pad), P).shard(rank, stand_in=True)
        assert len(batch) == len(before)
        for key in list(before) if hasattr(before, "keys") else range(len(before)):
            same = batch[key] == before[key]
            assert same.all() if isinstance(same, Tensor) else same


@pytest.mark.parametrize("place", [57, 125, 540])
def test_an_excerpt_has_one_of_few_targets(place: int) -> None:
    """None of them is in the excerpts at equal distances."""
    labels = torch.full((1, 600), -100)
    labels[0, place : place + 3] = 1
    batch = read_batch({"input_ids": torch.ones(1, 600, dtype=torch.long), "labels": labels}, BatchRules(), 2)
    short = most_filled(excerpts(batch, BatchRules(), 2, ()), BatchRules(), 2)
    assert short["labels"].shape[1] < 100 and bool((short["labels"] != -100).any())
