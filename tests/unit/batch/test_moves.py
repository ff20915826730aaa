"""How a batch comes to a GPU: from pinned memory, and with its documents known on the host."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lightning_ulysses.attention.mask_table import DocumentTable, document_runs
from lightning_ulysses.batch.pipeline import local_batch
from lightning_ulysses.batch.whole import read_batch
from lightning_ulysses.context import SequenceContext, activate
from lightning_ulysses.exchange.mesh import ALONE
from lightning_ulysses.geometry.batch_keys import BatchRules


def batch() -> dict[str, Tensor]:
    tokens = torch.arange(20)[None]
    return {"input_ids": tokens, "labels": tokens, "cu_seqlens": torch.tensor([0, 7, 12, 20])}


@pytest.mark.parametrize("pin", [True, False])
def test_every_slice_is_pinned_for_a_gpu(pin: bool) -> None:
    whole, seen = read_batch(batch(), BatchRules(), 2), []

    def pinned(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    with mock.patch("lightning_ulysses.batch.whole.pinned", pinned):
        _, shards, _ = whole.shard(1, stand_in=True, pin=pin)
    assert {"input_ids", "labels", "shift_labels"} <= set(shards)
    assert len(seen) == (len(shards) if pin else 0)


def test_cu_seqlens_are_read_before_they_are_moved() -> None:
    def move(cut: Any) -> Any:
        return {key: tensor.clone() for key, tensor in cut.items()}

    inputs, local = local_batch(read_batch(batch(), BatchRules(), 1), 0, move, torch.device("cpu"), stand_in=False)
    context = SequenceContext(ALONE)
    activate(context)
    try:
        with context.step(local), mock.patch.object(Tensor, "tolist", side_effect=AssertionError):
            assert document_runs(inputs["cu_seqlens"], 20) == ((0, 7), (7, 12), (12, 20))
    finally:
        activate(None)
    assert inputs["cu_seqlens"] in local.notes.of(DocumentTable)
