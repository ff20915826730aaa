"""Attention over whole sequences against an explicit masked softmax in float64, and what it costs."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from gpu_paths import gpu_paths
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ulysses.attention import MaskSpec, attend
from lightning_ulysses.attention.explicit import Extras
from lightning_ulysses.geometry.layout import Runs, runs_from_starts


def chunk_of(spec: MaskSpec, row: int, place: int) -> int:
    """Chunks are counted from the document's first token, or from the first one that is no left padding."""
    left = spec.valid[row][0][0] if spec.valid and spec.valid[row] else 0
    first = left
    for begin, end in spec.documents[row] if spec.documents else ():
        if begin <= place < end:
            first = left if begin == 0 and left < end else begin
    return 0 if spec.chunk is None else (place - first) // spec.chunk


def visible(spec: MaskSpec, rows: int, seq_len: int) -> Tensor:
    """(B, S, S): whether query i sees key j, token by token."""
    mask = torch.zeros(rows, seq_len, seq_len, dtype=torch.bool)
    for row in range(rows):
        documents = spec.documents[row] if spec.documents else ((0, seq_len),)
        valid = spec.valid[row] if spec.valid else ((0, seq_len),)
        for query in range(seq_len):
            for key in range(seq_len):
                mask[row, query, key] = (
                    any(begin <= query < end and begin <= key < end for begin, end in documents)
                    and any(begin <= key < end for begin, end in valid)
                    and not (spec.causal and key > query)
                    and not (spec.window is not None and key <= query - spec.window)
                    and not (spec.ahead is not None and key > query + spec.ahead)
                    and chunk_of(spec, row, query) == chunk_of(spec, row, key)
                    and key < seq_len - spec.num_padding
                )
    return mask


def reference(
    q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, scale: float | None, index: list[int], extras: Extras
) -> Tensor:
    """Softmax over what is visible; a query that sees nothing gets zeros."""
    k, v = k[:, index], v[:, index]
    mask = visible(spec, q.shape[0], q.shape[2])[:, None]
    scores = q @ k.transpose(2, 3) * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    if extras.softcap is not None:
        scores = (scores / extras.softcap).tanh() * extras.softcap
    if extras.alibi_slopes is not None:
        place = torch.arange(q.shape[2])
        scores = scores - extras.alibi_slopes[:, None, None] * (place[:, None] - place).abs()
    # At this size no shift by the largest score is needed.
    weights = scores.exp() * mask
    total = weights.sum(-1, keepdim=True)
    if extras.sinks is not None:
        total = total + extras.sinks[:, None, None].exp()
    return weights / total.clamp_min(1e-300) @ v


def inputs(rows: int, seq_len: int, heads: int, kv_heads: int, size: int = 4, value_size: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seq_len)
    shapes = ((heads, size), (kv_heads, size), (kv_heads, value_size))
    return [
        torch.randn(rows, h, seq_len, d, generator=generator, dtype=torch.float64).requires_grad_() for h, d in shapes
    ]


def check(
    spec: MaskSpec,
    rows: int = 1,
    seq_len: int = 12,
    heads: int = 2,
    kv_heads: int = 2,
    *,
    kv_index: tuple[int, ...] | None = None,
    scale: float | None = None,
    size: int = 4,
    value_size: int = 4,
    extras: Extras | None = None,
    runs: tuple[int, ...] = (),
) -> None:
    """Forward and backward; what the tokens of the padding get is nobody's concern. ``runs`` cut the queries."""
    q, k, v = inputs(rows, seq_len, heads, kv_heads, size, value_size)
    real = seq_len - spec.num_padding
    index = list(kv_index) if kv_index is not None else [head // (heads // kv_heads) for head in range(heads)]
    extras = extras or Extras()
    pieces = pairwise((0, *runs, seq_len))
    found = torch.cat(
        [
            attend(q[:, :, begin:end], k, v, spec, scale=scale, kv_index=kv_index, extras=extras, first=begin)
            for begin, end in pieces
        ],
        dim=2,
    )
    wanted = reference(q, k, v, spec, scale, index, extras)
    assert found.shape == wanted.shape == (rows, heads, seq_len, value_size)
    torch.testing.assert_close(found[:, :, :real], wanted[:, :, :real], atol=1e-12, rtol=1e-12)
    weights = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    weights[:, :, real:] = 0
    learned = [q, k, v, *(t for t in (extras.sinks, extras.alibi_slopes) if t is not None)]
    for got, want in zip(
        torch.autograd.grad((found * weights).sum(), learned, materialize_grads=True),
        torch.autograd.grad((wanted * weights).sum(), learned, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


DOCUMENTS: tuple[Runs, ...] = (((0, 5), (5, 6), (6, 12)),)
VALID: dict[str, Runs] = {
    "left": ((4, 12),),
    "right": ((0, 7),),
    "holes": ((1, 3), (5, 6), (8, 11)),
    "one": ((6, 7),),
    "nothing": (),
}
KINDS = {
    "causal": MaskSpec(True),
    "bidirectional": MaskSpec(False),
    "window": MaskSpec(True, window=3),
    "window of one": MaskSpec(True, window=1),
    "wide window": MaskSpec(True, window=40),
    "window on both sides": MaskSpec(False, window=3, ahead=2),
    "mostly ahead": MaskSpec(False, window=1, ahead=6),
    "wide on both sides": MaskSpec(False, window=40, ahead=40),
    "chunks": MaskSpec(True, chunk=4),
    "chunks on both sides": MaskSpec(False, chunk=5),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("valid", [None, *VALID])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_masks(kind: str, valid: str | None, documents: tuple[Runs, ...] | None) -> None:
    check(replace(KINDS[kind], documents=documents, valid=None if valid is None else (VALID[valid],)))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_differ(kind: str) -> None:
    documents = (((0, 12),), ((0, 4), (4, 12)), ((0, 1), (1, 2), (2, 12)))
    check(replace(KINDS[kind], documents=documents), rows=3)
    check(replace(KINDS[kind], valid=(((0, 12),), VALID["left"], VALID["holes"])), rows=3)
    check(replace(KINDS[kind], documents=DOCUMENTS * 2), rows=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("valid", [None, "left", "right", "holes"])
def test_added_padding(kind: str, valid: str | None) -> None:
    spec = replace(KINDS[kind], num_padding=3, valid=None if valid is None else (VALID[valid],))
    check(spec)
    check(replace(spec, documents=DOCUMENTS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "kv_index"), [(6, 2, None), (5, 2, (0, 0, 0, 1, 1)), (4, 2, (0, 1, 1, 1))]
)
def test_grouped_heads(kind: str, heads: int, kv_heads: int, kv_index: tuple[int, ...] | None) -> None:
    for spec in (KINDS[kind], replace(KINDS[kind], documents=DOCUMENTS, valid=(VALID["holes"],))):
        check(spec, heads=heads, kv_heads=kv_heads, kv_index=kv_index)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("valid", ["left", "holes", "nothing"])
def test_values_of_another_size_and_a_scale(kind: str, valid: str) -> None:
    check(replace(KINDS[kind], documents=DOCUMENTS), value_size=7, scale=0.3)
    check(replace(KINDS[kind], valid=(VALID[valid],)), value_size=3, scale=0.3)


@st.composite
def specs(draw: st.DrawFn) -> tuple[MaskSpec, int, int]:
    rows, seq_len = draw(st.integers(1, 3)), draw(st.integers(1, 11))
    documents = valid = None
    if draw(st.booleans()):
        documents = tuple(
            runs_from_starts(draw(st.lists(st.integers(0, seq_len - 1), max_size=4)), seq_len) for _ in range(rows)
        )
    if draw(st.booleans()):
        edges = st.lists(st.integers(0, seq_len), unique=True, max_size=6).map(sorted)
        drawn = [draw(edges) for _ in range(rows)]
        valid = tuple(tuple(zip(row[::2], row[1::2], strict=False)) for row in drawn)
    padding = draw(st.integers(0, min(3, seq_len - 1)))
    window, ahead = draw(st.none() | st.integers(1, 12)), None
    causal = draw(st.booleans())
    if window is not None and not causal:
        ahead = draw(st.integers(0, 12))
    chunk = draw(st.none() | st.integers(1, 12))
    return MaskSpec(causal, window, documents, valid, padding, ahead, chunk), rows, seq_len


@settings(deadline=None, max_examples=150)
@given(specs())
@example((MaskSpec(True, 2, (((0, 3), (3, 6)),), (((1, 2), (5, 6)),), 0), 1, 6))
def test_any_mask(drawn: tuple[MaskSpec, int, int]) -> None:
    check(drawn[0], drawn[1], drawn[2])


def extras_of(kind: str, heads: int) -> Extras:
    per_head = torch.linspace(0.3, 1.2, heads, dtype=torch.float64).requires_grad_()
    return {"softcap": Extras(0.7), "sinks": Extras(sinks=per_head), "alibi": Extras(alibi_slopes=per_head)}.get(
        kind, Extras(0.7, per_head, per_head)
    )


@pytest.mark.parametrize("extra", ["softcap", "sinks", "alibi", "all"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("valid", [None, "left", "holes", "nothing"])
def test_softcap_sinks_and_alibi(extra: str, kind: str, valid: str | None) -> None:
    spec = replace(KINDS[kind], valid=None if valid is None else (VALID[valid],))
    check(spec, heads=4, extras=extras_of(extra, 4))
    check(replace(spec, documents=DOCUMENTS, num_padding=2), heads=4, extras=extras_of(extra, 4))
    check(spec, heads=5, kv_index=(0, 0, 0, 1, 1), extras=extras_of(extra, 5), value_size=3, scale=0.3)


def test_explicit_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_ulysses.attention.explicit._BLOCK", 5)
    for kind in KINDS:
        check(KINDS[kind], seq_len=17, extras=extras_of("all", 2))


@settings(deadline=None, max_examples=60)
@given(specs(), st.sampled_from(["softcap", "sinks", "alibi", "all"]))
def test_any_mask_with_extras(drawn: tuple[MaskSpec, int, int], extra: str) -> None:
    check(drawn[0], drawn[1], drawn[2], extras=extras_of(extra, 2))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def cost(
    spec: MaskSpec, seq_len: int, rows: int = 1, extras: Extras | None = None
) -> tuple[list[tuple[int, int, int]], int]:
    """(queries, keys, mask elements) of each kernel call of a forward, and the largest tensor until after backward."""
    calls: list[tuple[int, int, int]] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        calls.append((q.shape[2], k.shape[2], 0 if attn_mask is None else attn_mask.numel()))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **kwargs)

    module = sys.modules["lightning_ulysses.attention.kernel"]
    q, k, v = (t.detach().float().requires_grad_() for t in inputs(rows, seq_len, 2, 2))
    largest = Largest()
    with mock.patch.object(module, "_sdpa", kernel), largest:
        attend(q, k, v, spec, extras=extras).sum().backward()
    return calls, largest.elements


@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_cost_the_sum_of_their_squares(causal: bool) -> None:
    lengths = [64] * 12 + [1, 255]
    runs = runs_from_starts([sum(lengths[:i]) for i in range(len(lengths))], 1024)
    calls, largest = cost(MaskSpec(causal, documents=(runs,)), 1024)
    assert calls == [(length, length, 0) for length in lengths]
    assert largest < 1024 * 1024 / 8


def test_rows_with_equal_documents_share_their_kernel_calls() -> None:
    runs = runs_from_starts([0, 100, 300], 512)
    shared = cost(MaskSpec(True, documents=(runs, runs, runs)), 512, rows=3)[0]
    assert shared == [(100, 100, 0), (200, 200, 0), (212, 212, 0)]
    other = runs_from_starts([0, 7], 512)
    assert len(cost(MaskSpec(True, documents=(runs, other)), 512, rows=2)[0]) == 5


@pytest.mark.parametrize("valid", [((0, 700),), ((300, 1024),), ((10, 500), (600, 1000))])
@pytest.mark.parametrize("causal", [True, False])
def test_a_padding_mask_builds_no_mask(valid: Runs, causal: bool) -> None:
    calls, largest = cost(MaskSpec(causal, valid=(valid,)), 1024)
    assert all(mask == 0 for _, _, mask in calls)
    assert largest < 1024 * 1024 / 8


def test_a_window_costs_twice_its_width_for_each_token() -> None:
    calls, largest = cost(MaskSpec(True, window=32), 1024)
    assert sum(queries * keys for queries, keys, _ in calls) <= 2 * 32 * 1024
    assert all(mask == queries * keys for queries, keys, mask in calls)
    assert largest < 1024 * 1024 / 8


def test_a_window_on_both_sides_costs_three_blocks_of_its_width() -> None:
    for padding in (0, 5):
        calls, largest = cost(MaskSpec(False, window=33, ahead=32, num_padding=padding), 1024)
        assert sum(queries * keys for queries, keys, _ in calls) <= 3 * 33 * 1024
        assert largest < 1024 * 1024 / 8


def test_explicit_attention_keeps_no_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor is the scores of one block, 2 heads * 64 queries * 1024 keys; none is kept for later."""
    monkeypatch.setattr("lightning_ulysses.attention.explicit._BLOCK", 64)
    extras = Extras(2.0, torch.zeros(2))
    assert cost(MaskSpec(True), 1024, extras=extras)[1] <= 2 * 64 * 1025
    saved: list[Tensor] = []
    q, k, v = (t.detach().float().requires_grad_() for t in inputs(1, 1024, 2, 2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        attend(q, k, v, MaskSpec(True), extras=extras)
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert sum(memory.values()) < 4 * 1024 * 64


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_queries(kind: str, on_gpu: bool) -> None:
    """Queries of a part of the sequence, to all of its keys."""
    with gpu_paths() if on_gpu else nullcontext():
        for runs in ((5,), (2, 7, 11)):
            settings: Any = {"rows": 2, "heads": 4, "size": 8, "value_size": 8, "runs": runs}
            for spec in (KINDS[kind], replace(KINDS[kind], num_padding=3)):
                check(spec, **settings)
            check(replace(KINDS[kind], documents=DOCUMENTS * 2), **settings)
            check(replace(KINDS[kind], documents=(((0, 12),), ((0, 4), (4, 12)))), kv_heads=1, **settings)
            for name in VALID:
                check(replace(KINDS[kind], valid=(VALID[name], ((0, 12),))), **settings)
            for name in ("softcap", "alibi", "all"):
                check(replace(KINDS[kind], documents=DOCUMENTS * 2), extras=extras_of(name, 4), **settings)


@pytest.fixture
def variable_length() -> Iterator[list[int]]:
    """A GPU's paths, with the number of documents of each call of the variable-length kernel."""
    with gpu_paths() as (varlen, _):
        yield varlen.calls


@pytest.mark.parametrize("kind", KINDS)
def test_one_call_for_all_documents(kind: str, variable_length: list[int]) -> None:
    spec = replace(KINDS[kind], documents=(((0, 12),), ((0, 4), (4, 12)), ((0, 1), (1, 2), (2, 12))))
    chunks = KINDS[kind].chunk is not None
    settings: Any = {"size": 8, "value_size": 8}
    check(spec, rows=3, heads=4, **settings)
    check(replace(KINDS[kind], documents=DOCUMENTS * 2), rows=2, scale=0.3, **settings)
    check(replace(KINDS[kind], documents=DOCUMENTS), heads=5, kv_index=(0, 0, 0, 1, 1), **settings)
    assert chunks or variable_length == [6, 6, 3]
    # What the kernel cannot do goes document by document.
    called = len(variable_length)
    check(replace(KINDS[kind], documents=None), rows=2, heads=4, kv_heads=2, **settings)
    # One document of a length that does not recur, or with a window, goes there as well.
    assert len(variable_length) == called + 1
    called += 1
    check(spec, rows=3, heads=4, size=8, value_size=4)
    check(spec, rows=3, heads=4, extras=extras_of("softcap", 4), **settings)
    check(replace(spec, valid=(VALID["holes"],) * 3), rows=3, heads=4, **settings)
    assert len(variable_length) == called


def test_one_whole_document_is_one_plain_call() -> None:
    assert cost(MaskSpec(True), 256)[0] == [(256, 256, 0)]
    assert cost(MaskSpec(True, valid=(((0, 256),),), documents=(((0, 256),),)), 256)[0] == [(256, 256, 0)]
