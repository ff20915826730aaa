"""What is refused before any process starts, and in which words."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import DeepSpeedPrecision
from models import HandWritten, pair_batch
from torch import Tensor

import lightning_ulysses
from lightning_ulysses import TokenCountMonitor, UlyssesDeepSpeedStrategy, UlyssesError
from lightning_ulysses.batch.whole import read_batch
from lightning_ulysses.checks.trainer import check_loss, check_trainer
from lightning_ulysses.context import LocalBatch, SequenceContext, activate
from lightning_ulysses.exchange.mesh import SequenceMesh, resolve_sizes
from lightning_ulysses.geometry.batch_keys import BatchRules
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.interceptors import torch_sdpa as sdpa
from lightning_ulysses.testing import QUIET

MESH = SequenceMesh(rank=0, world_size=2, sp_size=2, sp_rank=0, dp_size=1, dp_rank=0)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int64)


def assert_says(error: UlyssesError, parts: tuple[str, ...]) -> None:
    text = str(error)
    assert text.startswith("Got ") and " Expected " in text and " To fix: " in text
    assert [part for part in parts if part not in text] == [], text


def test_an_error_survives_the_way_between_processes() -> None:
    error = UlyssesError("a", "b", "c")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "Got a. Expected b. To fix: c." and again.fix == "c"


SIZES: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {
    # world, node, sp_size, dp_shard_size
    "world not divisible": (
        (12, 4, 5, None),
        ("sp_size=5", "world of 12 processes", "one of [1, 2, 3, 4, 6, 12]"),
    ),
    "more ranks than processes": ((2, 2, 4, None), ("sp_size=4", "world of 2 processes", "[1, 2]")),
    "a node that does not divide the world": ((9, 6, "auto", None), ("sp_size=6", "world of 9", "[1, 3, 9]")),
    "wrong product": (
        (8, 8, 2, 3),
        ("sp_size=2 * dp_shard_size=3 = 6", "world size, 8", "dp_shard_size=4", "[1, 2, 4, 8]"),
    ),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes(case: str) -> None:
    arguments, parts = SIZES[case]
    with pytest.raises(UlyssesError) as caught:
        resolve_sizes(*arguments)
    assert_says(caught.value, parts)


SETTINGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "stage": ({"stage": 0}, ("ZeRO stage 0", "stage 1, 2 or 3", "stage=1")),
    "no zero": ({"zero_optimization": False}, ("ZeRO stage 0", "stage=1")),
    "sp_size": ({"sp_size": 0}, ("sp_size=0", "'auto', a positive number")),
    "one factor": ({"sp_size": {"ulysses": 4}}, ("sp_size={'ulysses': 4}", "such as {'ulysses': 8, 'gather': 4}")),
    "no factor": ({"sp_size": {"ulysses": 4, "gather": 0}}, ("'gather': 0}", "such as {'ulysses': 8, 'gather': 4}")),
    "sp_size as text": ({"sp_size": "4"}, ("sp_size='4'", "'auto', a positive number")),
    "loss_weighting": ({"loss_weighting": "token"}, ("loss_weighting='token'", "'tokens'", "'none'")),
    "replicas": (
        {"dp_shard_size": 2, "dp_replicate_size": 2},
        ("dp_replicate_size=2", "MiCS", "hpZ", "dp_shard_size=4"),
    ),
    "data-parallel size": ({"dp_shard_size": 0}, ("dp_shard_size=0", "positive number or None")),
    "pad_to_multiple_of": ({"pad_to_multiple_of": 0}, ("pad_to_multiple_of=0", "positive")),
    "pad_to_multiple_of as text": ({"pad_to_multiple_of": "8"}, ("pad_to_multiple_of='8'", "whole number")),
    "half a token of padding": ({"pad_to_multiple_of": 2.5}, ("pad_to_multiple_of=2.5", "whole number")),
    "replicas as text": ({"dp_replicate_size": "1"}, ("dp_replicate_size='1'", "drop dp_replicate_size")),
    "a list of sequence_dims": ({"sequence_dims": ["x"]}, ("sequence_dims=['x']", "a mapping of keys", "{'x': 1}")),
    "sequence_dims as text": ({"sequence_dims": "x"}, ("sequence_dims='x'", "{'x': 1}")),
    "a dimension as text": ({"sequence_dims": {"x": "1"}}, ("sequence_dims={'x': '1'}", "{'x': 1}")),
    "a flag for a dimension": ({"sequence_dims": {"x": True}}, ("sequence_dims={'x': True}", "{'x': 1}")),
    "ignore_index as text": ({"ignore_index": "x"}, ("ignore_index='x'", "a whole number")),
    "no ignore_index": ({"ignore_index": None}, ("ignore_index=None", "a whole number")),
    "targets by index": ({"targets": 5}, ("targets=5", "the key of a tensor of the batch")),
    "several targets": ({"targets": ["labels"]}, ("targets=['labels']", "the key of a tensor of the batch")),
    "check_model as text": ({"check_model": "no"}, ("check_model='no'", "True or False")),
    "stage as a float": ({"stage": 2.0}, ("stage=2.0", "a whole number", "set stage=2")),
    "stage as text": ({"stage": "2"}, ("stage='2'", "set stage=2")),
    "a misspelt argument": ({"spsize": 2}, ("the argument 'spsize'", "write 'sp_size'")),
    "an argument of nobody": ({"quux": 2}, ("the argument 'quux'", "leave it out")),
    "a misspelt part": ({"memory": {"tiled_lost": True}}, ("'tiled_lost'", "write 'tiled_loss' for 'tiled_lost'")),
    "a part of nobody": ({"memory": {"quux": 1}}, ("memory={'quux': 1}", "leave 'quux' out")),
    "no mapping of parts": ({"memory": "all"}, ("memory='all'", "change memory")),
    "config as a number": ({"config": 5}, ("config=5", "a dict, the path of one, or None")),
}
CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "accumulation": ({"gradient_accumulation_steps": 4}, ("'gradient_accumulation_steps'", "accumulate_grad_batches")),
    "batch size": ({"train_batch_size": 8}, ("'train_batch_size'", "leave it out")),
    "mpu": ({"mpu": None}, ("'mpu'", "the strategy builds the groups")),
    "mesh": ({"mesh_param": [1, 2]}, ("'mesh_param'", "the strategy builds the groups")),
    "sequence size": ({"sequence_parallel_size": 2}, ("'sequence_parallel_size'", "sp_size in the strategy")),
    "data size": ({"data_parallel_size": 2}, ("'data_parallel_size'", "dp_shard_size in the strategy")),
    "tensor parallelism": ({"tensor_parallel": {"autotp_size": 2}}, ("'tensor_parallel'", "not supported")),
    "stage 0": ({"zero_optimization": {"stage": 0}}, ("ZeRO stage 0", "stage=1")),
    "no stage": ({"train_micro_batch_size_per_gpu": 1}, ("ZeRO stage 0", "stage=1")),
    "MiCS": ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, ("'mics_shard_size'", "over all processes")),
    "hpZ": (
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}},
        ("'zero_hpz_partition_size'", "over all processes"),
    ),
}


@pytest.mark.parametrize("case", [*SETTINGS, *CONFIGS])
def test_settings(case: str) -> None:
    settings, parts = SETTINGS[case] if case in SETTINGS else ({"config": CONFIGS[case][0]}, CONFIGS[case][1])
    with pytest.raises(UlyssesError) as caught:
        UlyssesDeepSpeedStrategy(**settings)
    assert_says(caught.value, parts)


def test_a_config_that_is_fine() -> None:
    zero = {"stage": 3, "mics_shard_size": -1, "zero_hpz_partition_size": 1}
    strategy = UlyssesDeepSpeedStrategy(sp_size=2, config={"zero_optimization": zero})
    assert isinstance(strategy.config, dict) and strategy.config["zero_optimization"]["stage"] == 3


MASK = "a 2-D padding mask (B, S)"
BATCHES: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "unknown keys": (
        {"signal": torch.zeros(2, 33, 4), "target": ones(2, 33), "name": "a"},
        {},
        (
            "'signal': (2, 33, 4) float32, 'target': (2, 33) int64, 'name': str",
            "cannot be identified",
            "sequence_dims={'signal': 1, 'target': 1}",
        ),
    ),
    "three tensors": (
        (ones(2, 33), ones(2, 33), ones(2)),
        {},
        ("'0': (2, 33) int64", "'2': (2,) int64", "sequence_dims={'0': 1, '1': 1, '2': 0}"),
    ),
    "an image": (
        {"image": torch.zeros(2, 3, 16, 16), "series": torch.zeros(2, 33, 5), "y": ones(2)},
        {},
        ("'image': (2, 3, 16, 16) float32", "set split='blocks'", "makes a sequence of 'image' itself"),
    ),
    "unequal pair": ((ones(2, 33), ones(2)), {}, ("'1': (2,) int64", "sequence_dims=")),
    "bare floats": (torch.zeros(2, 33), {}, ("'batch': (2, 33) float32", "sequence_dims={'batch': 1}")),
    "no tensors": ("text", {}, ("a batch of type str", "return a dict")),
    "several loaders": (
        {"a": {"input_ids": ones(2, 33)}, "b": {"input_ids": ones(2, 20)}},
        {"sequence_dims": {"input_ids": 1}},
        ("{'a': dict, 'b': dict}", "several dataloaders", "use one dataloader", "ConcatDataset"),
    ),
    "a list of loaders": ([(ones(2, 33), ones(2, 33))] * 2, {}, ("{'0': tuple, '1': tuple}", "use one dataloader")),
    "ambiguous": (
        {"input_ids": ones(2, 33), "scores": torch.zeros(2, 5, 33)},
        {},
        ("batch['scores'] of shape (2, 5, 33)", "33", "sequence_dims={'scores': 2}", "sequence_dims={'scores': None}"),
    ),
    "lengths": (
        {"input_ids": ones(2, 33), "labels": ones(2, 32)},
        {},
        ("{'input_ids': 33, 'labels': 32}", "'labels': (2, 32) int64", "sequence_dims={key: None}"),
    ),
    "4-D mask": (
        {"input_ids": ones(2, 33), "attention_mask": ones(2, 1, 33, 33)},
        {},
        ("batch['attention_mask'] of shape (2, 1, 33, 33)", MASK, "only locally"),
    ),
    "labels of the row": (
        {"input_ids": ones(2, 33), "labels": ones(2)},
        {},
        ("batch['labels'] of shape (2,)", "one label for each token (B, S)", "mean over tokens"),
    ),
    "positions of several axes": (
        {"input_ids": ones(2, 33), "position_ids": ones(3, 2, 33)},
        {},
        ("batch['position_ids'] of shape (3, 2, 33)", "sequence_dims={'position_ids': ...}"),
    ),
    "positions that stay": (
        {"input_ids": ones(2, 33), "position_ids": 0 * ones(2, 33)},
        {},
        ("position_ids of shape (2, 33) that never grow ([0, 0, 0, 0]...)", "leave position_ids out of the batch"),
    ),
    "no such key": ({"input_ids": ones(2, 33)}, {"dims": {"tokens": 1}}, ("sequence_dims={'tokens': 1}", "'0', '1'")),
    "no such dimension": (
        {"x": ones(2, 33)},
        {"dims": {"x": 2}},
        ("sequence_dims={'x': 2}", "shape (2, 33)", "between 0 and 1"),
    ),
    "float targets and padding": (
        (ones(2, 33), torch.zeros(2, 33)),
        {"pad": 8},
        ("pad_to_multiple_of=8", "floating-point targets", "leave pad_to_multiple_of out"),
    ),
    "too short": ({"input_ids": ones(2, 3)}, {}, ("3 tokens per row for sp_size=4", "one token for each rank")),
    "cu_seqlens": (
        {"input_ids": ones(2, 33), "cu_seqlens": torch.tensor([0, 20, 33])},
        {},
        ("cu_seqlens of shape (3,) with 2 rows", "position_ids that restart"),
    ),
    "no rows": ({"input_ids": ones(0, 33)}, {}, ("'input_ids': (0, 33) int64", "without a row", "drop_last=True")),
    "sparse": (
        {"x": ones(2, 33).to_sparse()},
        {"dims": {"x": 1}},
        ("batch['x'] of layout sparse_coo", "dense", ".to_dense()"),
    ),
    "nested": (
        {"input_ids": torch.nested.nested_tensor([ones(3), ones(5)], layout=torch.jagged)},
        {},
        ("batch['input_ids'], a nested tensor", "to_padded_tensor(0)", "attention_mask"),
    ),
}


def test_what_every_rank_gets_whole_may_be_sparse_or_empty() -> None:
    batch = {"input_ids": ones(2, 33), "edges": ones(2, 33).to_sparse(), "boxes": torch.zeros(0, 4)}
    assert set(read_batch(batch, BatchRules({"edges": None, "boxes": None}), 4).tensors) == {
        "input_ids",
        "shift_input_ids",
    }


@pytest.mark.parametrize("case", BATCHES)
def test_batches(case: str) -> None:
    batch, options, parts = BATCHES[case]
    rules = BatchRules(options.get("dims", {}), options.get("pad"))
    with pytest.raises(UlyssesError) as caught:
        read_batch(batch, rules, 4)
    assert_says(caught.value, parts)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"window": 3}, ("window=3 with is_causal=False", "is_causal=True")),
        ({"window": 0, "is_causal": True}, ("window=0 with is_causal=True", "positive")),
        ({"cu_seqlens": torch.tensor([0, 4])}, ("cu_seqlens with a batch of 2 rows", "one row")),
    ],
)
def test_ulysses_attention(arguments: dict[str, Any], parts: tuple[str, ...]) -> None:
    q = torch.zeros(2, 2, 4, 2)
    with pytest.raises(UlyssesError) as caught:
        lightning_ulysses.ulysses_attention(q, q, q, **arguments)
    assert_says(caught.value, parts)


def call_sdpa(query: Tensor, mask: Tensor | None = None) -> None:
    F.scaled_dot_product_attention(query, query, query, attn_mask=mask)


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: call_sdpa(torch.zeros(1, 4, 5, 8), torch.ones(5, 5)), ("mask of shape (5, 5)", "is_causal=True")),
        (lambda: call_sdpa(torch.zeros(5, 8)), ("shape (5, 8)", "(B, H, S_r, D)", "unsharded()")),
        (lambda: call_sdpa(torch.zeros(1, 4, 7, 8)), ("over 7 tokens", "holds 5 of the batch's 9", "unsharded()")),
        (lambda: lightning_ulysses.sequence_positions(ones(1, 4)), ("over 4 tokens", "holds 5", "unsharded()")),
        (lambda: lightning_ulysses.gather_sequence(ones(1, 4)), ("gather_sequence(x, dim=1) over 4 tokens", "holds 5")),
    ],
)
def test_calls_inside_a_step(call: Any, parts: tuple[str, ...]) -> None:
    context = SequenceContext(replace(MESH, sp_group=object()))
    handle = sdpa.install(context, {})
    activate(context)
    try:
        with context.step(LocalBatch(SequenceLayout(9, 2))), pytest.raises(UlyssesError) as caught:
            call()
    finally:
        activate(None)
        handle.remove()
    assert_says(caught.value, parts)


class TakesIterator(HandWritten):
    def training_step(self, dataloader_iter: Any) -> Any:
        raise NotImplementedError


def fake_trainer(precision: str = "32-true", algorithm: str | None = None) -> Any:
    plugin = DeepSpeedPrecision("32-true")
    return SimpleNamespace(
        precision=precision, gradient_clip_algorithm=algorithm, strategy=None, precision_plugin=plugin
    )


@pytest.mark.parametrize(
    ("trainer", "module", "parts"),
    [
        (fake_trainer(algorithm="value"), HandWritten, ("gradient_clip_algorithm='value'", "'norm'")),
        (fake_trainer(), TakesIterator, ("TakesIterator.training_step(dataloader_iter)", "take the batch")),
    ],
)
def test_trainer_and_module(trainer: Any, module: type[HandWritten], parts: tuple[str, ...]) -> None:
    with pytest.raises(UlyssesError) as caught:
        check_trainer(trainer, module())
    assert_says(caught.value, parts)
    check_trainer(fake_trainer(algorithm="norm"), HandWritten())


@pytest.mark.parametrize("precision", ["16-mixed", "16-true"])
def test_half_precision_where_the_device_has_none(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: None)
    with pytest.raises(UlyssesError) as caught:
        check_trainer(fake_trainer(precision), HandWritten())
    assert_says(caught.value, (f"precision={precision!r}", "cannot compute in it", "precision='bf16-mixed'"))
    check_trainer(fake_trainer("bf16-mixed"), HandWritten())
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    check_trainer(fake_trainer(precision), HandWritten())


def test_the_monitor_needs_the_strategy() -> None:
    trainer = L.Trainer(accelerator="cpu", devices=1, max_steps=1, callbacks=[TokenCountMonitor()], **QUIET)
    with pytest.raises(UlyssesError) as caught:
        trainer.fit(HandWritten(), [pair_batch(0)])
    assert_says(caught.value, ("TokenCountMonitor with SingleDeviceStrategy", "strategy='ulysses_deepspeed'"))


@pytest.mark.parametrize("output", [torch.tensor(1.0), torch.ones((), requires_grad=True), {"loss": torch.ones(())}])
def test_losses_without_a_gradient(output: Any) -> None:
    with pytest.raises(UlyssesError) as caught:
        check_loss(HandWritten(), output)
    assert_says(caught.value, ("HandWritten.training_step that depends on no parameter", "detach()"))


def test_losses_that_are_fine() -> None:
    loss = torch.ones(2, requires_grad=True).sum()
    for output in (loss, {"loss": loss}, {"other": 1}):
        check_loss(HandWritten(), output)
