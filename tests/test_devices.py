"""Attention and steps on the devices that this machine has. What needs a GPU says how many.

The paths of a GPU are counted on stand-ins in ``tests/unit/attention/test_gpu_paths.py``; here are its own kernels.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
import torch.distributed as dist
from gpu_paths import bytes_kept
from models import LlamaModule, count_targets, token_batch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from lightning_ulysses.attention.attend import attend
from lightning_ulysses.attention.explicit import Extras
from lightning_ulysses.attention.flash import flash_kernel
from lightning_ulysses.attention.fused_extras import why_by_formula
from lightning_ulysses.attention.kernel import Kernel
from lightning_ulysses.attention.packed import _varlen, attend_packed
from lightning_ulysses.batch.clock import Clock
from lightning_ulysses.config import UlyssesConfig
from lightning_ulysses.data import PackingCollator
from lightning_ulysses.exchange import all_to_all
from lightning_ulysses.exchange.mesh import MeshSizes, SequenceMesh
from lightning_ulysses.geometry.distance import largest
from lightning_ulysses.geometry.mask_spec import MaskSpec
from lightning_ulysses.sequence_parallel import SequenceParallel
from lightning_ulysses.testing import SplitRun, StepResult, compare, fit_single, fit_split
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


@pytest.mark.skipif(_varlen() is None, reason="torch without windows in varlen_attn")
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


def attention_kept(spec: MaskSpec, seq_len: int, dtype: torch.dtype, kv_heads: int = 2) -> float:
    """Bytes that attention on a GPU keeps for its backward, in units of q."""
    q, k, v = (torch.randn(1, h, seq_len, 64, device="cuda", dtype=dtype).requires_grad_() for h in (8, kv_heads, 2))
    return bytes_kept(attend, q, k, v, spec) / (q.numel() * q.element_size())


@pytest.mark.parametrize("device", [on("cuda", 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [MaskSpec(True), MaskSpec(True, window=256)])
def test_kept_bytes_do_not_grow_with_the_square(device: str, dtype: torch.dtype, spec: MaskSpec) -> None:
    short, long = (attention_kept(spec, seq_len, dtype) for seq_len in (1000, 4000))
    assert long <= 1.3 * short + 1


@pytest.mark.parametrize("device", [on("cuda", 1)])
@pytest.mark.parametrize("spec", [MaskSpec(True, window=16), MaskSpec(False, window=16, ahead=15)])
def test_windows_on_a_gpu(device: str, spec: MaskSpec) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, 333, 64).to(device, torch.bfloat16) for heads in (8, 2, 2)]
    exact = with_gradients(partial(attend, spec=spec), [t.double().cpu() for t in inputs])
    found = with_gradients(partial(attend, spec=spec), inputs)
    assert largest(errors(found, exact)) < 0.02


@pytest.mark.parametrize("device", [on("cuda", 1)])
def test_more_documents_than_the_grid_of_a_kernel(device: str) -> None:
    length = 70_000
    runs = tuple((place, place + 1) for place in range(length))
    q, k, v = (torch.randn(1, 2, length, 16, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    out = attend(q, k, v, MaskSpec(True, documents=(runs,)))
    out.float().sum().backward()
    torch.testing.assert_close(out, v, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("device", [on("cuda", 1)])
def test_fewer_key_heads_on_a_gpu_are_as_close_as_copies(device: str) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, 300, 64).to(device) for heads in (8, 2, 2)]
    exact = with_gradients(partial(attend, spec=MaskSpec(True)), [t.double().cpu() for t in inputs])
    assert largest(errors(with_gradients(partial(attend, spec=MaskSpec(True)), inputs), exact)) < 5e-3


@pytest.mark.parametrize("device", [on("cuda", 1)])
@pytest.mark.parametrize("name", ["softcap", "sinks", "slopes"])
def test_softcap_sinks_and_alibi_in_one_kernel(device: str, name: str) -> None:
    numbers = torch.linspace(0.1, 0.8, 8)
    made = {"softcap": Extras(1.5), "sinks": Extras(sinks=numbers), "slopes": Extras(alibi_slopes=numbers)}[name]
    on_gpu = Extras(made.softcap, *(None if t is None else t.to(device) for t in (made.sinks, made.alibi_slopes)))
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, EDGES[-1], 64).to(device, torch.bfloat16) for heads in (8, 2, 2)]
    assert why_by_formula(*inputs, Kernel(None, 0.0, on_gpu)) is None
    for spec in (MaskSpec(True, documents=(tuple(pairwise(EDGES)),) * 2), MaskSpec(True, window=16), MaskSpec(False)):
        exact = with_gradients(partial(attend, spec=spec, extras=made), [t.double().cpu() for t in inputs])
        found = with_gradients(partial(attend, spec=spec, extras=on_gpu), inputs)
        assert largest(errors(found, exact)) < 0.02


@pytest.mark.parametrize("device", [on("cuda", 1)])
@pytest.mark.parametrize("module", ["flash_attn", "flash_attn_interface", "flash_attn.cute"])
def test_flash_attn_itself(device: str, module: str) -> None:
    package = pytest.importorskip(module)
    kernel = flash_kernel(package.flash_attn_varlen_func, module)
    assert kernel is not None
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, EDGES[-1], 64).to(device, torch.bfloat16) for heads in (8, 2, 2)]
    for spec in (
        MaskSpec(True, documents=(tuple(pairwise(EDGES)),)),
        MaskSpec(True, window=16, documents=(tuple(pairwise(EDGES)),)),
        MaskSpec(False),
    ):
        exact = with_gradients(partial(attend, spec=spec), [t.double().cpu() for t in inputs])
        found = with_gradients(partial(attend, spec=spec, flash=kernel), inputs)
        assert largest(errors(found, exact)) < 0.02


@pytest.mark.parametrize("device", [on("cuda", 1)])
def test_edges_are_copied_without_a_wait(device: str) -> None:
    q, k, v = (torch.randn(1, 4, EDGES[-1], 64, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    spec = MaskSpec(True, documents=(tuple(pairwise(EDGES)),))
    attend(q, k, v, spec).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(q, k, v, spec).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


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


def exchange_by_host(
    recv: Tensor, send: Tensor, recv_sizes: list[int], send_sizes: list[int], group: dist.ProcessGroup
) -> None:
    """gloo has no all-to-all between GPUs."""
    received = torch.empty(recv.numel(), dtype=recv.dtype)
    dist.all_to_all_single(received, send.reshape(-1).cpu(), recv_sizes, send_sizes, group=group)
    recv.view(-1).copy_(received)


def on_one_device(rank: int, device: str, batch: Any) -> StepResult:
    """A step of one of two processes on the same device, whose collectives are gloo's: NCCL wants a device for each."""
    dist.init_process_group("gloo", rank=rank, world_size=2)
    module = llama_in(torch.bfloat16).to(device).train()
    before = {name: p.detach().float().cpu().clone() for name, p in module.named_parameters()}
    optimizer: Any = module.configure_optimizers()
    mesh, where = SequenceMesh.create(MeshSizes(2, 1), "cpu"), torch.device(device, 0)
    core = SequenceParallel(UlyssesConfig(sp_size=2), mesh, where, seed=0)
    with core.installed(module), mock.patch.object(all_to_all, "_exchange", exchange_by_host):
        inputs = core.receive(batch, Clock(), lambda cut: {key: tensor.to(where) for key, tensor in cut.items()})
        with core.step(Clock(), "training_step"):
            loss = module.training_step(inputs, 0)
        with core.backward():
            core.weigh(loss).backward()
        for parameter in module.parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(gradient)
            parameter.grad = gradient / 2
        optimizer.step()
        core.stepped()
    after = {name: p.detach().float().cpu().clone() for name, p in module.named_parameters()}
    return StepResult((float(core.weights.global_loss()),), (1.0,), before, after)


@pytest.mark.parametrize("device", [on("cpu", 0), on("cuda", 1)])
def test_processes_that_share_a_device_are_within_twice_the_error_of_one(pool: ProcessPool, device: str) -> None:
    batch = token_batch(3, 33)
    exact = fit_single(partial(llama_in, torch.float32), [[batch]], count_targets)
    alone = compare(fit_single(partial(llama_in, torch.bfloat16), [[batch]], count_targets), exact)
    for result in pool.run(on_one_device, device, batch, world_size=2):
        found = compare(result, exact)
        assert found.step <= 2 * alone.step and found.loss <= 2 * alone.loss + 1e-3
