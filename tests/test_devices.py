"""Packed documents on the devices that this machine has: kernels in half precision, and a step on two processes."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import lightning as L
import pytest
import torch
from models import LlamaModule, count_targets, token_batch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from lightning_ulysses.attention.attend import attend
from lightning_ulysses.attention.explicit import Extras
from lightning_ulysses.attention.kernel import Kernel
from lightning_ulysses.attention.packed import attend_packed
from lightning_ulysses.data import PackingCollator
from lightning_ulysses.geometry.mask_spec import MaskSpec
from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool

GPUS = torch.cuda.device_count()
EDGES = (0, 70, 71, 200, 333)


def on(device: str, gpus: int) -> Any:
    """The name of a device, left out with fewer GPUs than that."""
    return pytest.param(device, marks=pytest.mark.skipif(gpus > GPUS, reason=f"needs {gpus} GPUs"))


def document_by_document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(1, H, S, D): each document attends to itself alone."""
    parts = [[t[:, :, begin:end] for t in (q, k, v)] for begin, end in pairwise(EDGES)]
    return torch.cat([scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts], dim=2)


def with_gradients(function: Any, inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of q, k and v, as float64 on the CPU."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    torch.manual_seed(1)
    grad = torch.randn(out.shape, dtype=torch.float64).to(out)
    return [t.detach().double().cpu() for t in (out, *torch.autograd.grad(out, leaves, grad))]


def errors(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", [on("cpu", 0), on("cuda", 1)])
def test_packed_attention_is_as_close_as_one_document_at_a_time(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, EDGES[-1], 64).to(device, dtype) for heads in (8, 2, 2)]
    spec = MaskSpec(causal=True, documents=(tuple(pairwise(EDGES)),))
    exact = with_gradients(document_by_document, [t.double() for t in inputs])
    alone = errors(with_gradients(document_by_document, inputs), exact)
    packed = errors(with_gradients(partial(attend, spec=spec), inputs), exact)
    assert all(ours <= 2 * theirs + 1e-6 for ours, theirs in zip(packed, alone, strict=True))
    leaking = with_gradients(partial(attend, spec=MaskSpec(causal=True)), inputs)
    assert min(errors(leaking, exact)) > 0.1


@pytest.mark.parametrize("window", [(-1, 0), (4, 0), (-1, -1)])
def test_torch_takes_the_call_for_all_documents_at_once(window: tuple[int, int]) -> None:
    """Of torch's own function only the kernel is left out, which wants a GPU: what it is given and returns is not."""
    with FakeTensorMode():
        leaves = [torch.empty(2, heads, EDGES[-1], 64, dtype=torch.bfloat16) for heads in (8, 2, 2)]
        q, k, v = (t.requires_grad_() for t in leaves)
        out = attend_packed(q, k, v, Kernel(None, 0.0, Extras()), [tuple(pairwise(EDGES))], window)
        grads = torch.autograd.grad(out.sum(), [q, k, v])
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert [grad.shape for grad in grads] == [t.shape for t in (q, k, v)]


def llama_in(dtype: torch.dtype, implementation: str = "sdpa") -> L.LightningModule:
    return LlamaModule(implementation=implementation, lr=0.5).to(dtype)


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("device", [on("cpu", 0), on("gpu", 2)])
def test_a_packed_step_is_as_close_as_its_documents_one_by_one(
    pool: ProcessPool, device: str, implementation: str
) -> None:
    tokens = token_batch(3, 33)["input_ids"]
    documents = [{"input_ids": part, "labels": part} for part in tokens.split([7, 12, 1, 13], dim=1)]
    packed = PackingCollator()([{key: value[0] for key, value in document.items()} for document in documents])
    exact = fit_single(partial(llama_in, torch.float32), [documents], count_targets)
    alone = compare(fit_single(partial(llama_in, torch.bfloat16), [documents], count_targets), exact)
    run = SplitRun(2, 2, trainer={"accelerator": device, "precision": "bf16-true"})
    for result in fit_split(pool, partial(llama_in, torch.float32, implementation), [packed], run):
        found = compare(result, exact)
        assert found.step <= 2 * alone.step and found.loss <= 2 * alone.loss + 1e-3
    assert alone.step < 0.05
