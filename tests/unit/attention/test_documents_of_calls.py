"""``cu_seqlens`` of an explicit attention call, in every type that holds them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lightning_ulysses import UlyssesError, ulysses_attention
from lightning_ulysses.attention.mask_table import document_runs
from lightning_ulysses.context import LocalBatch, SequenceContext, activate
from lightning_ulysses.exchange.mesh import ALONE
from lightning_ulysses.geometry.layout import SequenceLayout


def heads(seq_len: int = 9) -> torch.Tensor:
    return torch.randn(1, 2, seq_len, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda edges: torch.tensor(edges, dtype=torch.int16)])
def test_documents_are_kept_apart(kind: Any) -> None:
    q = heads()
    expected = ulysses_attention(q, q, q, cu_seqlens=torch.tensor([0, 4, 9]))
    assert torch.equal(ulysses_attention(q, q, q, cu_seqlens=kind([0, 4, 9])), expected)
    assert not torch.allclose(ulysses_attention(q, q, q), expected)


@pytest.mark.parametrize("edges", [[0.0, 9.0], torch.tensor([0.0, 9.0]), [[0, 9]], "09"])
def test_no_edges(edges: Any) -> None:
    with pytest.raises(UlyssesError, match=r"cu_seqlens of .*Expected the cumulative lengths"):
        ulysses_attention(heads(), heads(), heads(), cu_seqlens=edges)


def test_views_of_the_same_edges_are_told_apart() -> None:
    context, edges = SequenceContext(ALONE), torch.tensor([0, 9, 4, 9])
    activate(context)
    try:
        with context.step(LocalBatch(SequenceLayout(9, 1))):
            assert document_runs(edges[:2], 9) == ((0, 9),)
            assert document_runs(edges[::2], 9) == ((0, 4), (4, 9))
            with torch.inference_mode():
                edges = torch.tensor([0, 2])
                assert document_runs(edges, 9) == ((0, 2), (2, 9))
                # Nothing counts writes here.
                edges[1] = 3
                assert document_runs(edges, 9) == ((0, 3), (3, 9))
    finally:
        activate(None)
