"""What a slice holds and what a model computes, against loops over tokens and torch's own counts."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import LlamaModule, hand_written
from packs import document_lengths
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_ulysses import TokenCountMonitor, UlyssesError
from lightning_ulysses.callbacks.token_ledger import count_slice, find_padding
from lightning_ulysses.context import LocalBatch
from lightning_ulysses.cost.flops import model_operations, peak_of_name
from lightning_ulysses.geometry.layout import SequenceLayout, runs_from_starts


def random_layout(seed: int) -> tuple[SequenceLayout, Tensor]:
    """A layout and the document of each of its tokens (B, S), -1 for padding."""
    rng = np.random.default_rng(seed)
    seq_len, rows, added = int(rng.integers(8, 40)), int(rng.integers(1, 4)), int(rng.integers(0, 4))
    owner = torch.zeros(rows, seq_len, dtype=torch.long)
    documents, valid = [], []
    for row in range(rows):
        begins = sorted(rng.choice(seq_len - added, size=int(rng.integers(1, 5)), replace=False).tolist())
        documents.append(runs_from_starts(begins, seq_len))
        for number, (begin, end) in enumerate(documents[-1]):
            owner[row, begin:end] = number
        keep = np.flatnonzero(rng.random(seq_len - added) < 0.7)
        edges = np.flatnonzero(np.diff(keep) > 1)
        runs = np.split(keep, edges + 1) if len(keep) else []
        valid.append(tuple((int(run[0]), int(run[-1]) + 1) for run in runs))
    kind = seed % 4
    if kind == 1:
        owner[:] = 0
    if kind in (2, 3):
        mask = torch.zeros_like(owner, dtype=torch.bool)
        for row, runs in enumerate(valid):
            for begin, end in runs:
                mask[row, begin:end] = True
        owner[~mask] = -1
    owner[:, seq_len - added :] = -1
    layout = SequenceLayout(
        seq_len, 1 + seed % 3, None if kind == 1 else tuple(documents), tuple(valid) if kind > 1 else None, added
    )
    return layout, owner


@pytest.mark.parametrize("seed", range(24))
def test_slices_against_a_loop_over_tokens(seed: int) -> None:
    layout, owner = random_layout(seed)
    lengths = document_lengths(owner)
    for rank in range(layout.sp_size):
        span = layout.spans[rank]
        found = count_slice(layout, len(owner), rank)
        places = [(row, t) for row in range(len(owner)) for t in range(span.start, span.stop) if owner[row, t] >= 0]
        assert found.tokens == owner[:, span].numel() and found.real == len(places)
        assert found.pairs == sum(int(lengths[row][owner[row, t]]) for row, t in places)
        firsts = [(row, t) for row, t in places if owner[row, t] not in owner[row, :t]]
        assert found.documents == len(firsts)


def judged(labels: list[int], tokens: list[int], second: int) -> list[float] | None:
    """What is found in a row of two documents, on one rank."""
    size = len(tokens)
    layout = SequenceLayout(size, 1, (runs_from_starts([second], size),))
    shards = {"input_ids": torch.tensor([tokens]), "shift_labels": torch.tensor([labels])}
    counts = {"shift_labels": float(sum(label != -100 for label in labels))}
    live = LocalBatch(layout, shards=shards, counts=counts)
    found = find_padding(count_slice(layout, 1, 0).tails, live, "shift_labels", size, -100)
    return None if found is None else found.tolist()


def test_only_a_repeated_token_without_targets_is_padding() -> None:
    assert judged([1, 2, -100, -100, -100], [5, 1, 2, 0, 0], 3) == [2, 1, 4]
    # A document that is all prompt, one that has a target, and a row that is one document.
    assert judged([1, 2, -100, -100, -100], [5, 1, 2, 0, 3], 3) == [0, 0, 0]
    assert judged([1, 2, -100, 0, -100], [5, 1, 2, 0, 0], 3) == [0, 0, 0]
    assert judged([-100, -100, -100, -100, -100], [0] * 5, 0) is None
    # The stand-in target of a slice without any.
    layout = SequenceLayout(4, 1, (runs_from_starts([2], 4),))
    shards = {"input_ids": torch.zeros(1, 4), "shift_labels": torch.tensor([[-100, -100, 0, -100]])}
    live = LocalBatch(layout, shards=shards, counts={"shift_labels": 0.0})
    found = find_padding(count_slice(layout, 1, 0).tails, live, "shift_labels", 4, -100)
    assert found is not None and found.tolist() == [2, 1, 4]


def test_operations_are_those_that_torch_counts() -> None:
    module, tokens = LlamaModule(implementation="eager"), torch.zeros(1, 64, dtype=torch.long)
    operations = model_operations(module)
    assert operations.heads == 4
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.model(input_ids=tokens)
    # Eager attention computes both halves of the matrix.
    wanted = (operations.per_token * 64 + 2 * operations.per_pair * 64**2) / 3
    assert counter.get_total_flops() == pytest.approx(wanted, rel=0.01)


def test_operations_of_other_modules() -> None:
    plain_module = hand_written()()
    parameters = sum(p.numel() for p in plain_module.parameters())
    assert model_operations(plain_module).per_token == 6 * parameters
    assert model_operations(plain_module).per_pair == 0
    encoder = LlamaModule().model
    causal = model_operations(encoder)
    for layer in encoder.modules():
        if hasattr(layer, "is_causal"):
            layer.is_causal = False
    assert model_operations(encoder).per_pair == 2 * causal.per_pair
    partitioned = torch.nn.Linear(3, 1, bias=False)
    partitioned.weight.ds_numel = 12  # type: ignore[attr-defined]
    assert model_operations(partitioned).per_token == 72
    partitioned.config = SimpleNamespace(hidden_size=8)  # type: ignore[assignment]
    assert model_operations(partitioned).per_token == 72


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce GT 710", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert peak_of_name(name) == peak


@pytest.mark.parametrize("peak", [0.0, -1.0, math.inf, math.nan, "989e12", True])
def test_a_peak_that_is_none(peak: Any) -> None:
    with pytest.raises(UlyssesError, match=r"peak_flops=.*operations per second of one device.*989e12"):
        TokenCountMonitor(peak_flops=peak)
