"""Which operators answer when attention is repeated, and in which memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ulysses import UlyssesError
from lightning_ulysses.attention.repeated import _is_kernel, run

aten = torch.ops.aten
KERNELS = [
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._flash_attention_forward,
    aten._efficient_attention_forward,
]
OTHERS = [
    aten._scaled_dot_product_flash_attention_backward,
    aten._scaled_dot_product_efficient_attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
    aten._flash_attention_backward,
    aten._fused_sdp_choice,
    aten.bmm,
]


def test_kernels_are_known_by_name() -> None:
    assert all(_is_kernel(kernel.default) for kernel in KERNELS)
    assert not any(_is_kernel(other.default) for other in OTHERS)


def test_variable_length_kernels_are_known_by_name() -> None:
    pytest.importorskip("torch.nn.attention.varlen")
    assert _is_kernel(torch.ops.torch_attn._varlen_attn.default)
    assert not _is_kernel(torch.ops.torch_attn._varlen_attn_backward.default)
    # It writes into an argument, which would stay empty if it only answered.
    if hasattr(torch.ops.torch_attn, "_varlen_attn_out"):
        assert not _is_kernel(torch.ops.torch_attn._varlen_attn_out.default)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def inputs() -> list[Tensor]:
    return [torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 1, 3), (0, 2, 1, 3)])
def test_the_output_comes_in_any_memory_layout(order: tuple[int, ...]) -> None:
    tensors = inputs()
    out, trace, kept = run(attention, [tensor.clone() for tensor in tensors])
    # The log-sum-exp alone: the output is the caller's.
    assert [tensor.shape for tensor in kept] == [(2, 3, 5)] and not out.requires_grad
    back = [order.index(dim) for dim in range(4)]
    given = out.permute(order).contiguous().permute(back)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    again = trace.repeat(attention, leaves, given, kept)
    assert torch.equal(again, out)
    wanted = [tensor.clone().requires_grad_() for tensor in tensors]
    for a, b in zip(
        torch.autograd.grad(again.square().sum(), leaves),
        torch.autograd.grad(attention(*wanted).square().sum(), wanted),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-14, rtol=0)


def test_another_computation_is_an_error() -> None:
    """Not wrong numbers."""
    tensors = inputs()
    out, trace, kept = run(attention, [tensor.clone() for tensor in tensors])

    def shorter(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k[:, :, :4], v[:, :, :4])

    with pytest.raises(RuntimeError, match="did not run at this place"):
        trace.repeat(shorter, [tensor.requires_grad_() for tensor in tensors], out, kept)


@pytest.mark.parametrize("is_leaf", [True, False])
def test_parameters_of_a_function_are_found(is_leaf: bool) -> None:
    weight: Any = torch.ones(1, dtype=torch.float64, requires_grad=True)
    weight = weight if is_leaf else weight * 2

    def learning(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * weight, k, v)

    with pytest.raises(UlyssesError, match="set head_chunks=1"):
        run(learning, inputs(), is_hidden=True)
    _, trace, kept = run(attention, inputs(), is_hidden=True)
    assert trace.calls is None and not kept
