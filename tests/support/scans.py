"""Stand-ins for kernels that need a GPU: token by token, with the kernels' arguments, documents among them.

Sources of the arguments: `fla.ops`, `mamba_ssm.ops`, `causal_conv1d`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ulysses.mixing.call import MixerCall
from lightning_ulysses.mixing.table import TABLE


def _begins(length: int, rows: int, edges: Any, numbers: Tensor | None) -> Tensor:
    """(B, S) bool: where a document begins."""
    found = torch.zeros(rows, length, dtype=torch.bool)
    found[:, 0] = True
    if edges is not None:
        found[:, [edge for edge in torch.as_tensor(edges).tolist() if edge < length]] = True
    if numbers is not None:
        found[:, 1:] |= numbers[:, 1:] != numbers[:, :-1]
    return found


def _delta(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, begins: Tensor, scale: float) -> Tensor:
    """The gated delta rule: q, k (B, S, G, K), v (B, S, H, V), decay in log space (B, S, H, K | 1), beta (B, S, H)."""
    times = v.shape[2] // q.shape[2]
    q, k = (t.repeat_interleave(times, dim=2) for t in (q, k))
    state = v.new_zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    out = []
    for t in range(v.shape[1]):
        state = torch.where(begins[:, t, None, None, None], torch.zeros_like(state), state)
        state = state * decay[:, t].exp().unsqueeze(-1)
        found = (state * k[:, t].unsqueeze(-1)).sum(-2)
        state = state + k[:, t].unsqueeze(-1) * ((v[:, t] - found) * beta[:, t].unsqueeze(-1)).unsqueeze(-2)
        out.append((state * (scale * q[:, t]).unsqueeze(-1)).sum(-2))
    return torch.stack(out, dim=1)


def _normal(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    q, k = (_normal(t) if use_qk_l2norm_in_kernel else t for t in (q, k))
    begins = _begins(v.shape[1], v.shape[0], cu_seqlens, None)
    return _delta(q, k, v, g.unsqueeze(-1).to(v.dtype), beta, begins, scale or q.shape[-1] ** -0.5), None


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    q, k = (_normal(t) if use_qk_l2norm_in_kernel else t for t in (q, k))
    if use_gate_in_kernel:
        assert A_log is not None and dt_bias is not None
        g = -A_log.exp().unsqueeze(-1) * F.softplus(g + dt_bias.view(g.shape[2], -1))
    begins = _begins(v.shape[1], v.shape[0], cu_seqlens, None)
    return _delta(q, k, v, g, beta, begins, scale or q.shape[-1] ** -0.5), None


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor:
    times = x.shape[2] // B.shape[2]
    B, C = (t.repeat_interleave(times, dim=2) for t in (B, C))
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    begins = _begins(x.shape[1], x.shape[0], None, seq_idx)
    state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    out = []
    for t in range(x.shape[1]):
        state = torch.where(begins[:, t, None, None, None], torch.zeros_like(state), state)
        state = state * (dt[:, t] * A).exp()[..., None, None]
        state = state + (dt[:, t, :, None] * x[:, t]).unsqueeze(-1) * B[:, t].unsqueeze(-2)
        out.append((state * C[:, t].unsqueeze(-2)).sum(-1))
    y = torch.stack(out, dim=1)
    y = y if D is None else y + x * (D if D.dim() == 2 else D.unsqueeze(-1))
    return y if z is None else y * F.silu(z)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor:
    def each(t: Tensor) -> Tensor:
        # (C, N), (B, N, S) or (B, G, N, S) -> (B, C, N, S)
        if t.dim() == 2:
            return t[None, :, :, None].expand(*u.shape[:2], -1, u.shape[2])
        t = t.unsqueeze(1) if t.dim() == 3 else t
        return t.repeat_interleave(u.shape[1] // t.shape[1], dim=1)

    B, C = each(B), each(C)
    delta = delta if delta_bias is None else delta + delta_bias.unsqueeze(-1)
    delta = F.softplus(delta) if delta_softplus else delta
    state, out = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        state = state * (delta[:, :, t, None] * A).exp() + (delta * u)[:, :, t, None] * B[..., t]
        out.append((state * C[..., t]).sum(-1))
    y = torch.stack(out, dim=-1)
    y = y if D is None else y + u * D.unsqueeze(-1)
    return y if z is None else y * F.silu(z)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    # As the kernel: documents are told apart in one order in memory only.
    assert seq_idx is None or x.stride(1) == 1
    total = torch.zeros_like(x) if bias is None else bias[:, None].expand_as(x)
    for back in range(weight.shape[1]):
        # (B, C, S), moved by `back` tokens
        moved = F.pad(x, (back, 0))[:, :, : x.shape[2]]
        if seq_idx is not None:
            same = F.pad(seq_idx, (back, 0), value=-1)[:, : x.shape[2]] == seq_idx
            moved = moved * same.unsqueeze(1)
        total = total + moved * weight[:, weight.shape[1] - 1 - back, None]
    return total if activation is None else F.silu(total)


def no_fused_kernel(*args: Any, **kwargs: Any) -> None:
    """transformers calls the others then."""


#: By the names of transformers' functions, for which they stand.
STANDS_FOR = {
    "torch_chunk_gated_delta_rule": chunk_gated_delta_rule,
    "chunk_kimi_delta_attention": chunk_kda,
    "mamba2_chunk_scan": mamba_chunk_scan_combined,
    "mamba_selective_scan": selective_scan_fn,
    "mamba_inner_fn": no_fused_kernel,
    "mamba2_split_conv1d_scan_combined": no_fused_kernel,
    "causal_conv1d_fn": causal_conv1d_fn,
}


def halved(name: str, original: Any) -> Any:
    """A function of the table that runs on both halves of the sequence by themselves."""

    def run(*args: Any, **kwargs: Any) -> Any:
        call = MixerCall(name, TABLE[name], original, args, kwargs)
        half, length = call.lengths[0] // 2, call.lengths[0]
        dims = {key: letters.index("s") for key, letters in call.dims.items() if "s" in letters}
        parts = [
            call.run({key: call.given[key].narrow(dim, begin, count) for key, dim in dims.items()})
            for begin, count in ((0, half), (half, length - half))
        ]
        return call.write(torch.cat(parts, dim=dims[call.mixer.like]))

    return run


@contextmanager
def kernels_in(name: str) -> Iterator[None]:
    """Inside, a module of transformers calls stand-ins, as if the kernels were installed; others it calls as before."""
    with mock.patch.multiple(
        sys.modules[name], **{k: _filtered(v) for k, v in STANDS_FOR.items() if hasattr(sys.modules[name], k)}
    ):
        yield


def _filtered(kernel: Any) -> Any:
    """transformers passes kernels only the arguments that they know."""
    known = set(inspect.signature(kernel).parameters)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return kernel(*args, **{key: value for key, value in kwargs.items() if key in known})

    return wrapped
