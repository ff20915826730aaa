"""Which kernels a GPU would run, by counts of calls, operations and kept bytes; stand-ins compute on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from gpu_paths import CudaSdpa, TorchVarlen, bytes_kept, gpu_paths, varlen_attention
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ulysses.attention import MaskSpec, attend
from lightning_ulysses.attention import document_calls as module
from lightning_ulysses.attention.document_calls import divide
from lightning_ulysses.attention.explicit import Extras
from lightning_ulysses.attention.flash import FlashKernel, flash_kernel
from lightning_ulysses.attention.grouped import heads_of
from lightning_ulysses.attention.kernel import Kernel
from lightning_ulysses.attention.kernel_report import KernelReport
from lightning_ulysses.attention.packed import attend_packed
from lightning_ulysses.context import LocalBatch, SequenceContext, activate
from lightning_ulysses.exchange.mesh import ALONE
from lightning_ulysses.geometry.layout import Runs, SequenceLayout, runs_from_starts


@pytest.fixture
def gpu() -> Iterator[tuple[TorchVarlen, CudaSdpa]]:
    with gpu_paths() as stand_ins:
        yield stand_ins


def tensors(seq_len: int, heads: int, kv_heads: int, dtype: torch.dtype, rows: int = 1, size: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seq_len)
    return [
        torch.randn(rows, h, seq_len, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]


class Count(TorchDispatchMode):
    """Counts dispatched operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


GROUPED = {
    "float32": (torch.float32, MaskSpec(True), None),
    "float32, window": (torch.float32, MaskSpec(True, window=64), None),
    "bias": (torch.bfloat16, MaskSpec(True), True),
    "padding": (torch.bfloat16, MaskSpec(True, window=64, valid=(((0, 100),),)), None),
    "large heads": (torch.bfloat16, MaskSpec(True), None),
}


def kept(case: str, seq_len: int) -> float:
    """Bytes that attention keeps for its backward, in units of q."""
    dtype, spec, has_bias = GROUPED[case]
    size = 264 if case == "large heads" else 16
    q, k, v = tensors(seq_len, 8, 2, dtype, size=size)
    bias = torch.ones(1, 1, seq_len, seq_len, dtype=torch.bool) if has_bias else None
    # The bias is the caller's, and its memory is there in any case.
    own = 0 if bias is None else bias.numel()
    return (bytes_kept(attend, q, k, v, spec, bias=bias) - own) / (q.numel() * q.element_size())


@pytest.mark.parametrize("case", GROUPED)
def test_fewer_key_heads_never_reach_the_math_kernel(case: str, gpu: tuple[TorchVarlen, CudaSdpa]) -> None:
    short, long = kept(case, 128), kept(case, 512)
    assert gpu[1].chosen and "math" not in gpu[1].chosen
    # Kept bytes grow with S. (The CPU's kernel keeps a mask of its own for a bias.)
    assert long <= 1.5 * short + 1 or case == "bias"


def test_fewer_key_heads_as_they_are_would_reach_it(gpu: tuple[TorchVarlen, CudaSdpa]) -> None:
    with mock.patch("lightning_ulysses.attention.kernel._groups", return_value=True):
        short, long = kept("float32", 128), kept("float32", 512)
    assert set(gpu[1].chosen) == {"math"} and long > 2 * short


def test_half_precision_without_a_mask_copies_no_heads(gpu: tuple[TorchVarlen, CudaSdpa]) -> None:
    q, k, v = tensors(1024, 8, 2, torch.bfloat16)
    attend(q, k, v, MaskSpec(True))
    assert gpu[1].chosen == ["flash"] and bytes_kept(attend, q, k, v, MaskSpec(True)) < 3 * q.numel() * 2


@pytest.mark.parametrize("spec", [MaskSpec(True, window=8), MaskSpec(False, window=9, ahead=4)])
def test_a_window_over_one_document_is_one_call(spec: MaskSpec, gpu: tuple[TorchVarlen, CudaSdpa]) -> None:
    q, k, v = tensors(1024, 4, 2, torch.bfloat16)
    with Count() as count:
        attend(q, k, v, spec)
    varlen, sdpa = gpu
    assert varlen.calls == [1] and not sdpa.chosen
    # A block of its window at a time: some hundred operations, and masks that are kept.
    q, k, v = tensors(1024, 4, 2, torch.float32)
    with Count() as blocks:
        attend(q, k, v, spec)
    assert count.calls < 60 < 1000 < blocks.calls


def test_a_pack_of_more_documents_than_a_grid_has_room_for(gpu: tuple[TorchVarlen, CudaSdpa]) -> None:
    length = 140_000
    runs = tuple((place, place + 1) for place in range(length))
    q, k, v = tensors(length, 2, 1, torch.bfloat16, size=8)
    out = attend(q, k, v, MaskSpec(True, documents=(runs,)))
    assert torch.equal(out, v.expand_as(out)) and sum(gpu[0].calls) == length
    # In the backward, 128 rows of a float32 buffer for each document.
    assert max(gpu[0].calls) * 128 <= length
    torch.autograd.grad(out.float().sum(), [q, k, v], allow_unused=True)


@given(st.lists(st.one_of(st.integers(1, 40), st.integers(1, 30_000)), min_size=1, max_size=300))
def test_calls_cover_all_documents_in_order(lengths: list[int]) -> None:
    counts = divide(lengths)
    assert sum(counts) == len(lengths) and min(counts) >= 1 and max(counts) <= 65_535
    begins = [sum(counts[:index]) for index in range(len(counts) + 1)]
    for begin, end in pairwise(begins):
        blocks = [-(-length // 128) for length in lengths[begin:end]]
        assert len(blocks) * max(blocks) <= 2 * sum(blocks) + 4096


def test_one_long_document_beside_many_short_ones() -> None:
    counts = divide([10] * 5_000 + [100_000] + [10] * 5_000)
    assert len(counts) < 20 and sum(counts) == 10_001
    # All in one call would be 782 blocks for each of them.
    assert max(counts) < 1_600
    assert divide([1000] * 100) == [100]


@pytest.fixture
def live() -> Iterator[SequenceContext]:
    """A step on two rows of four documents."""
    runs = runs_from_starts([0, 5, 9, 20], 33)
    context = SequenceContext(ALONE)
    activate(context)
    with context.step(LocalBatch(SequenceLayout(33, 1, (runs, runs)), rows=2)):
        yield context
    activate(None)


def test_edges_are_built_once_for_each_batch(live: SequenceContext, gpu: tuple[TorchVarlen, CudaSdpa]) -> None:
    assert live.region is not None
    documents = live.region.layout.documents
    assert documents is not None
    with mock.patch.object(module, "_prepare", wraps=module._prepare) as prepare:
        for _ in range(3):
            # As interceptors do: a new spec for each call, about the same documents.
            attend(*tensors(33, 4, 2, torch.bfloat16, rows=2), MaskSpec(True, documents=(documents[0], documents[1])))
            attend(*tensors(33, 4, 2, torch.bfloat16, rows=2), MaskSpec(True, documents=documents, chunk=4))
        assert prepare.call_count == 2
        other: Runs = ((0, 33),)
        attend(*tensors(33, 4, 2, torch.bfloat16, rows=2), MaskSpec(True, documents=(other, other)))
        assert prepare.call_count == 3
    assert gpu[0].calls == [8, 20, 8, 20, 8, 20, 2]


def test_cudnn_plans_only_for_lengths_that_recur(gpu: tuple[TorchVarlen, CudaSdpa]) -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    for length in (1024, 1023, 2048):
        attend(*tensors(length, 2, 2, torch.bfloat16), MaskSpec(True))
    # 1023 tokens are one document for the variable-length kernel; dropout keeps it away from there.
    assert gpu[1].cudnn == [True, True] and gpu[0].calls == [1]
    attend(*tensors(1023, 2, 2, torch.bfloat16), MaskSpec(True), dropout_p=0.1)
    assert gpu[1].cudnn == [True, True, False] and torch.backends.cuda.cudnn_sdp_enabled() == before


def test_each_kernel_is_named_once(live: SequenceContext, gpu: tuple[TorchVarlen, CudaSdpa]) -> None:
    said: list[str] = []
    live.notes.of(KernelReport).say = said.append
    runs = runs_from_starts([0, 5, 9, 20], 33)
    for _ in range(2):
        attend(*tensors(33, 4, 2, torch.bfloat16), MaskSpec(True, documents=(runs,)))
        attend(*tensors(33, 4, 2, torch.float32), MaskSpec(True, documents=(runs,)))
        attend(*tensors(33, 4, 4, torch.bfloat16), MaskSpec(True), extras=Extras(2.0))
        attend(*tensors(33, 4, 4, torch.bfloat16), MaskSpec(True), extras=Extras(2.0), dropout_p=0.1)
    assert len(said) == 5
    fast, slow, each, fused, formula = said
    assert "variable-length flash kernel." in fast and "slower" not in fast
    assert "calls for each document" in slow and "torch.float32" in slow
    assert "efficient" in each and "slower" not in each
    assert "flex_attention" in fused and "slower" not in fused
    assert "its formula" in formula and "dropout" in formula


@pytest.mark.parametrize("index", [(0, 0, 0, 1, 1), (0, 1, 1, 2), (0, 0)])
def test_heads_are_copied_without_an_index_tensor(index: tuple[int, ...]) -> None:
    x = torch.randn(2, max(index) + 1, 3, 4, dtype=torch.float64, requires_grad=True)
    with mock.patch.object(torch, "tensor", side_effect=AssertionError):
        out = heads_of(x, index)
    wanted = x[:, list(index)]
    weights = torch.randn_like(wanted)
    assert torch.equal(out, wanted)
    assert torch.allclose(*(torch.autograd.grad((t * weights).sum(), x)[0] for t in (out, wanted)))


def flash_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    assert cu_seqlens_q.dtype == torch.int32 and max_seqlen_q == int(cu_seqlens_q.diff().max())
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    window = (window_size[0], 0) if causal else window_size
    extras = {"softcap": softcap, "alibi_slopes": alibi_slopes}
    return varlen_attention(q, k, v, cu_seqlens_q, window, softmax_scale, cu_seqlens_k, **extras)


def flash_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    window = (window_size[0], 0) if causal else window_size
    return varlen_attention(q, k, v, cu_seqlens_q, window, softmax_scale, softcap=softcap), q


def flash_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    assert cu_seqlens_q is not None
    left, right = window_size
    window: Any = (left, 0) if causal else (left, right)
    extras = {"softcap": softcap, "sinks": learnable_sink}
    return varlen_attention(q, k, v, cu_seqlens_q, window, softmax_scale, **extras), None


VERSIONS: dict[str, Any] = {"2": flash_2, "3": flash_3, "4": flash_4}
SPECS = {
    "causal": MaskSpec(True),
    "both sides": MaskSpec(False),
    "window": MaskSpec(True, window=4),
    "window on both sides": MaskSpec(False, window=4, ahead=2),
    "packed": MaskSpec(True, documents=(((0, 5), (5, 20), (20, 33)), ((0, 33),))),
    "packed window": MaskSpec(True, window=3, documents=(((0, 5), (5, 20), (20, 33)),) * 2),
}


def results(flash: FlashKernel | None, spec: MaskSpec, **settings: Any) -> list[Tensor]:
    q, k, v = tensors(33, 4, 2, torch.float64, rows=2)
    out = attend(q, k, v, spec, flash=flash, **settings)
    return [out, *torch.autograd.grad((out * torch.linspace(0, 1, out.numel()).view_as(out)).sum(), [q, k, v])]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", SPECS)
def test_flash_attn_computes_the_exchanged_call(version: str, kind: str) -> None:
    function = mock.create_autospec(VERSIONS[version], side_effect=VERSIONS[version])
    kernel = flash_kernel(VERSIONS[version], f"flash-attn {version}")
    assert kernel is not None
    object.__setattr__(kernel, "function", function)
    with gpu_paths() as (varlen, sdpa):
        found = results(kernel, SPECS[kind], scale=0.3)
        with_softcap = results(kernel, SPECS[kind], extras=Extras(1.5))
    assert function.call_count == 2 and not varlen.calls and not sdpa.chosen
    for got, wanted in ((found, {"scale": 0.3}), (with_softcap, {"extras": Extras(1.5)})):
        for ours, theirs in zip(got, results(None, SPECS[kind], **wanted), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("version", "settings", "takes"),
    [
        ("2", {"extras": Extras(alibi_slopes=torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))}, True),
        ("3", {"extras": Extras(alibi_slopes=torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))}, False),
        ("4", {"extras": Extras(sinks=torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))}, True),
        ("2", {"extras": Extras(sinks=torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))}, False),
        # Its gradient would be lost.
        ("4", {"extras": Extras(sinks=torch.zeros(4, dtype=torch.float64, requires_grad=True))}, False),
        ("3", {"dropout_p": 1e-9}, False),
        ("2", {"dropout_p": 1e-9}, True),
        ("2", {"dropout_p": 1e-9, "extras": Extras(1.5)}, False),
    ],
)
def test_what_a_version_lacks_is_computed_otherwise(version: str, settings: dict[str, Any], takes: bool) -> None:
    calls: list[int] = []

    def noting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return VERSIONS[version](*args, **kwargs)

    kernel = flash_kernel(VERSIONS[version], f"flash-attn {version}")
    assert kernel is not None
    object.__setattr__(kernel, "function", noting)
    with gpu_paths():
        found = results(kernel, SPECS["packed"], **settings)
    assert bool(calls) == takes
    for got, wanted in zip(found, results(None, SPECS["packed"], **settings), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "spec", [MaskSpec(True), MaskSpec(True, window=8), MaskSpec(True, documents=(((0, 9), (9, 64)),))]
)
def test_a_run_of_queries_is_one_call(spec: MaskSpec, gpu: tuple[TorchVarlen, CudaSdpa]) -> None:
    q, k, v = tensors(64, 4, 2, torch.bfloat16)
    attend(q[:, :, 20:40], k, v, spec, first=20)
    varlen, sdpa = gpu
    assert varlen.calls == [1] and not sdpa.chosen


def test_on_a_cpu_flash_attn_is_not_called() -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    kernel = flash_kernel(flash_2, "flash-attn 2")
    assert kernel is not None
    object.__setattr__(kernel, "function", fails)
    results(kernel, SPECS["packed"])
    assert flash_kernel(lambda q, k, v: q, "another") is None and flash_kernel(None, "none") is None


def test_a_kernel_for_several_calls_gives_the_gradients_of_one() -> None:
    runs = runs_from_starts([0, 5, 9, 20], 33)
    q, k, v = tensors(33, 4, 2, torch.float64, rows=2)
    with gpu_paths() as (varlen, _):
        whole = attend_packed(q, k, v, Kernel(None, 0.0), [runs], (-1, 0))
        with mock.patch.object(module, "divide", return_value=[3, 1, 4]):
            parts = attend_packed(q, k, v, Kernel(None, 0.0), [runs], (-1, 0))
    assert varlen.calls == [8, 3, 1, 4]
    for out in (whole, parts):
        assert torch.allclose(out, whole)
    grads = [torch.autograd.grad(out.square().sum(), [q, k, v]) for out in (whole, parts)]
    assert all(torch.allclose(a, b) for a, b in zip(*grads, strict=True))
