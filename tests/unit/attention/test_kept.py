"""Attention calls whose outputs are kept: gradients, kernels that run once, and the bytes that are kept."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from gpu_paths import gpu_paths
from memory import MemoryCount
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ulysses import UlyssesError
from lightning_ulysses.attention import MaskSpec
from lightning_ulysses.attention.attend import Softmax
from lightning_ulysses.attention.call import AttentionCall
from lightning_ulysses.attention.explicit import Extras
from lightning_ulysses.attention.kept import KeptAttention, Ledger, OnDevice
from lightning_ulysses.attention.route import AttentionTally, route
from lightning_ulysses.attention.ulysses import exchanged
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.exchange.mesh import ALONE, SequenceMesh
from lightning_ulysses.geometry.layout import SequenceLayout, runs_from_starts

S, D = 40, 8
DOCUMENTS = (runs_from_starts([0, 7, 20], S),)
EXTRAS = Extras(softcap=2.0, alibi_slopes=torch.tensor([0.1, 0.2, 0.3, 0.4]))


class Kernels(TorchDispatchMode):
    """Counts the attention kernels that run forward."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.forwards += "attention" in str(func) and "backward" not in str(func)
        return func(*args, **(kwargs or {}))


def inputs(heads: int, kv_heads: int, length: int = S, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(heads)
    return [
        torch.randn(2, count, length, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]


def block(tensors: list[Tensor], meaning: Softmax, ledger: Ledger | None) -> Tensor:
    """Two attention calls one after another, each with something around it."""
    batch = LocalBatch(SequenceLayout(tensors[0].shape[2], 1))
    q, k, v = (2 * tensor for tensor in tensors)
    for _ in range(2):
        keeps = ledger is not None and ledger.takes((q, k, v), meaning)
        compute = ledger.answer if ledger is not None and keeps else exchanged
        # Drawn after what attention draws.
        q = torch.tanh(compute(batch, q, k, v, meaning, ALONE)) * (0.5 + torch.rand(()))
    return q


def run(tensors: list[Tensor], meaning: Softmax, said: list[str] | None, keeper: Any = None) -> tuple[Tensor, int]:
    """The output and the kernels that ran; gradients are left in the tensors."""
    ledger = None if said is None else Ledger(keeper or OnDevice(), said.append)
    state: dict[str, bool] = {}

    def again(*given: Tensor) -> Tensor:
        if state and ledger is not None:
            ledger.rewind()
        state["ran"] = True
        return block(list(given), meaning, ledger)

    torch.manual_seed(5)
    for tensor in tensors:
        tensor.grad = None
    with Kernels() as kernels:
        out = torch.utils.checkpoint.checkpoint(again, *tensors, use_reentrant=False)
        out.square().sum().backward()
    return out.detach(), kernels.forwards


MEANINGS: dict[str, Softmax] = {
    "causal": Softmax(MaskSpec(True)),
    "bidirectional": Softmax(MaskSpec(False), scale=0.3),
    "documents": Softmax(MaskSpec(True, documents=DOCUMENTS * 2)),
    "window": Softmax(MaskSpec(True, window=5)),
    "padding": Softmax(MaskSpec(True, valid=(((0, 30),), ((5, 40),)))),
    "bias": Softmax(MaskSpec(True), bias=torch.randn(4, S, S, dtype=torch.float64)),
    "by its formula": Softmax(MaskSpec(True), extras=EXTRAS),
    "dropout": Softmax(MaskSpec(True), dropout_p=0.4),
}


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", MEANINGS)
def test_gradients(name: str, kv_heads: int) -> None:
    said: list[str] = []
    tensors, meaning = inputs(4, kv_heads), MEANINGS[name]
    wanted, twice = run(tensors, meaning, None)
    gradients = [tensor.grad for tensor in tensors]
    found, once = run(tensors, meaning, said)
    assert torch.equal(found, wanted)
    for tensor, gradient in zip(tensors, gradients, strict=True):
        assert gradient is not None and tensor.grad is not None
        assert (tensor.grad - gradient).norm() <= 1e-12 * gradient.norm()
    # Each kernel runs once where there is one that the dispatcher sees; with dropout torch has none on the CPU.
    is_seen = name not in ("by its formula", "dropout")
    assert (once == twice // 2 > 0 and not said) if is_seen else (once == twice == 0 and len(set(said)) == 1)


@pytest.fixture
def gpu() -> Iterator[None]:
    with gpu_paths():
        yield


@pytest.mark.parametrize("name", [name for name in MEANINGS if name != "dropout"])
def test_paths_of_a_gpu(name: str, gpu: None) -> None:
    tensors = inputs(4, 2)
    wanted, _ = run(tensors, MEANINGS[name], None)
    gradients = [tensor.grad for tensor in tensors]
    found, _ = run(tensors, MEANINGS[name], [])
    assert torch.equal(found, wanted)
    for tensor, gradient in zip(tensors, gradients, strict=True):
        assert gradient is not None and tensor.grad is not None
        assert (tensor.grad - gradient).norm() <= 1e-12 * gradient.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_precision(dtype: torch.dtype) -> None:
    tensors = inputs(4, 2, dtype=torch.float32)
    results = []
    for ledger in (None, Ledger(OnDevice(), lambda reason: None)):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            out = block(tensors, Softmax(MaskSpec(True)), ledger)
        results.append(torch.autograd.grad(out.float().square().sum(), tensors))
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()


class Counting(OnDevice):
    """Counts the bytes that are kept."""

    def __init__(self) -> None:
        self.bytes = 0

    def keep(self, tensor: Tensor) -> Any:
        self.bytes += tensor.untyped_storage().nbytes()
        return tensor


KEPT = {
    # The output and the log-sum-exp.
    "causal": (D + 1) / D,
    # Pieces of the output besides.
    "documents": (2 * D + 1) / D,
}


@pytest.mark.parametrize("name", KEPT)
def test_kept_bytes(name: str) -> None:
    tensors, keeper = inputs(4, 2), Counting()
    run(tensors, MEANINGS[name], [], keeper)
    assert keeper.bytes == 2 * KEPT[name] * tensors[0].numel() * 8


def test_bytes_between_forward_and_backward() -> None:
    """Counted by what lives: the two calls keep nothing else, and nothing is left after the backward."""
    tensors, meaning = inputs(4, 2, length=600), MEANINGS["causal"]
    ledger, state = Ledger(OnDevice(), lambda reason: None), list[int]()

    def again(*given: Tensor) -> Tensor:
        if state:
            ledger.rewind()
        state.append(1)
        return block(list(given), meaning, ledger).sum()

    with MemoryCount() as count:
        count.hold(*tensors)
        before = count.now
        out = torch.utils.checkpoint.checkpoint(again, *tensors, use_reentrant=False)
        assert count.now - before == 2 * (D + 1) / D * tensors[0].numel() * 8 + 8
        out.backward()
        for tensor in tensors:
            tensor.grad = None
        del out
        ledger._entries.clear()
        assert count.now - before == 0


def test_a_learned_bias_is_computed_twice() -> None:
    said: list[str] = []
    bias = torch.randn(4, S, S, dtype=torch.float64, requires_grad=True)
    tensors, meaning = inputs(4, 4), Softmax(MaskSpec(True), bias=bias)
    run(tensors, meaning, None)
    wanted, bias.grad = bias.grad, None
    run(tensors, meaning, said)
    assert wanted is not None and torch.equal(bias.grad, wanted) and "learned bias" in said[0]  # type: ignore[arg-type]


def test_an_output_that_is_written_to_is_refused() -> None:
    batch, ledger, state = LocalBatch(SequenceLayout(S, 1)), Ledger(OnDevice(), lambda reason: None), list[int]()

    def again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if state:
            ledger.rewind()
        state.append(1)
        out = ledger.answer(batch, 2 * q, k, v, MEANINGS["causal"], ALONE)
        out *= 2
        return out.exp()

    out = torch.utils.checkpoint.checkpoint(again, *inputs(4, 4), use_reentrant=False)
    with pytest.raises(UlyssesError, match="writes in place"):
        out.sum().backward()


def test_attention_to_a_memory_is_said_to_be_computed_twice() -> None:
    said: list[str] = []
    context = SequenceContext(SequenceMesh(0, 2, 2, 0, 1, 0))
    context.notes.of(AttentionTally).attends_memory = True
    batch = LocalBatch(SequenceLayout(S, 2))
    q, (_, k, v) = inputs(4, 4, S // 2)[0], inputs(4, 4, 7)
    call = AttentionCall(q, k, v, lambda batch, known: MEANINGS["bidirectional"])
    with context.step(batch), context.notes.of(KeptAttention).within(Ledger(OnDevice(), said.append)):
        assert route(context, batch, call, lambda: "its own") == "its own"
    assert said == ["attention to a memory"]


def test_said_once() -> None:
    note = KeptAttention()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        note.say("a reason")
        note.say("a reason")
    assert ["checkpoint='block+attention': a reason is computed again" in str(each.message) for each in caught] == [
        True
    ]
