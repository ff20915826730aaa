"""Softcap, sinks and ALiBi in one fused kernel on a GPU: torch's compiled ``flex_attention``.

The kernel is tried against the formula before it is used, since it is compiled on the user's machine. What it cannot
compute, or computes differently, goes by the formula of `explicit`.

Sources: torch ``nn/attention/flex_attention.py``; sinks from the log-sum-exp, transformers
``integrations/flex_attention.py``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lightning_ulysses.attention.explicit import Extras, explicit_attention
from lightning_ulysses.attention.grouped import repeat_heads
from lightning_ulysses.attention.kernel import Kernel
from lightning_ulysses.attention.kernel_report import note_kernel
from lightning_ulysses.attention.rows import Row, live_batch
from lightning_ulysses.attention.visible_blocks import VisibleKeys, visible_keys

_NAME = "torch's flex_attention"

# Tokens of the try, in two documents: more than one block of the kernel.
_TRIED = 200

# Largest relative difference from the formula. Float32 may be rounded to TF32 on its way.
_BOUND = 3e-2


@functools.lru_cache(maxsize=1)
def _flex() -> Callable[..., Any]:
    """The compiled kernel, below its interceptor. It raises where it would have to run without being compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Any] = torch.compile(inspect.unwrap(flex_attention), fullgraph=True)
    return compiled


def _with_lse() -> dict[str, Any]:
    """The argument that asks for the log-sum-exp, whose name changed in torch 2.9."""
    import torch.nn.attention.flex_attention as package

    request = getattr(package, "AuxRequest", None)
    return {"return_lse": True} if request is None else {"return_aux": request(lse=True)}


def _lse_of(beside: Any) -> Tensor:
    lse: Tensor = beside if isinstance(beside, Tensor) else beside.lse
    return lse


def fused(q: Tensor, k: Tensor, v: Tensor, keys: VisibleKeys, extras: Extras, scale: float | None) -> Tensor:
    """Attention with `Extras` in one call.

    Args:
        q: (B, H, S, D).
        k: (B, heads, S, D). The number of heads divides H.
        v: (B, heads, S, D_v).
        keys: What each query sees.
        extras: Changes of the scores.
        scale: Scale of the scores; 1 / sqrt(D) if None.

    Returns:
        (B, H, S, D_v).
    """
    ratio = q.shape[1] // k.shape[1]
    # The kernel takes groups of a power of two.
    if ratio & (ratio - 1):
        k, v, ratio = repeat_heads(k, ratio), repeat_heads(v, ratio), 1
    softcap, slopes = extras.softcap, extras.alibi_slopes

    def score(value: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if softcap is not None:
            value = softcap * torch.tanh(value / softcap)
        return value if slopes is None else value - slopes[head] * (query - key).abs()

    settings: dict[str, Any] = {"scale": scale, "enable_gqa": ratio > 1}
    mod = score if softcap is not None or slopes is not None else None
    if extras.sinks is None:
        out: Tensor = _flex()(q, k, v, mod, keys.mask, **settings)
        return out
    out, beside = _flex()(q, k, v, mod, keys.mask, **settings, **_with_lse())
    # exp(lse) / (exp(lse) + exp(sink)): (B, H, S) and (H, 1) -> (B, H, S, 1)
    lse = _lse_of(beside)
    share = torch.sigmoid(lse - extras.sinks.to(lse.dtype)[:, None]).unsqueeze(-1)
    return (out * share).to(out.dtype)


@dataclass
class FusedExtras:
    """A note on a process: which kinds of calls the kernel computes as the formula does.

    Attributes:
        reasons: For each kind why not, or None.
    """

    reasons: dict[tuple[Any, ...], str | None] = field(default_factory=dict)

    def reason(self, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel) -> str | None:
        """Why a call goes by the formula, or None. Tries the kernel at the first call of a kind.

        Args:
            q: (B, H, S, D).
            k: (B, heads, S, D).
            v: (B, heads, S, D_v).
            kernel: The arguments of the attention call.
        """
        extras = kernel.extras
        assert extras is not None
        slopes = extras.alibi_slopes
        if kernel.dropout_p:
            return "softcap, sinks or ALiBi with attention dropout"
        if slopes is not None and slopes.requires_grad:
            return "ALiBi with slopes that learn"
        if is_in_torch_dispatch_mode(include_infra_modes=False):
            return "softcap, sinks or ALiBi in a call that is repeated in the backward"
        ratio = q.shape[1] // k.shape[1]
        traits = (extras.softcap, slopes is not None, extras.sinks is not None, kernel.scale)
        kind = (*traits, q.dtype, q.device, q.shape[3], v.shape[3], ratio)
        if kind not in self.reasons:
            self.reasons[kind] = _tried(q, v, ratio, extras, kernel.scale)
        return self.reasons[kind]


_KNOWN = FusedExtras()


def _strong(extras: Extras, heads: int, q: Tensor) -> Extras:
    """Extras of the same kind for some heads, strong enough to show in attention with scores of about 1."""
    numbers = torch.linspace(0.1, 1.0, heads, device=q.device)
    return Extras(
        None if extras.softcap is None else 1.5,
        None if extras.sinks is None else numbers.to(extras.sinks.dtype).requires_grad_(),
        None if extras.alibi_slopes is None else numbers.to(extras.alibi_slopes.dtype),
    )


def _tried(q: Tensor, v: Tensor, ratio: int, extras: Extras, scale: float | None) -> str | None:
    """Compares kernel and formula, with their gradients, on random numbers of the call's kind."""
    generator = torch.Generator().manual_seed(0)
    # (1, ratio | 1, tokens, D), the heads of one group
    sizes = ((ratio, q.shape[3]), (1, q.shape[3]), (1, v.shape[3]))
    numbers = [torch.randn(1, heads, _TRIED, size, generator=generator) for heads, size in sizes]
    if scale is not None:
        # Scores of about 1, whatever the scale.
        numbers[0] = numbers[0] / (scale * q.shape[3] ** 0.5)
    leaves = [tensor.to(q).requires_grad_() for tensor in numbers]
    one, two, three = leaves
    own = _strong(extras, ratio, q)
    if own.sinks is not None:
        leaves.append(own.sinks)
    keys = visible_keys([(((0, 70), (70, _TRIED)), None)], 1, _TRIED, causal=True, reach=None, device=q.device)
    place = torch.arange(_TRIED, device=q.device)
    # (tokens, tokens)
    mask = (place >= keys.begins[0][:, None]) & (place < keys.ends[0][:, None])
    found = []
    with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
        try:
            for out in (
                fused(one, two, three, keys, own, scale),
                explicit_attention(one, two, three, extras=own, mask=mask, scale=scale),
            ):
                grads = torch.autograd.grad(out.float().square().sum(), leaves)
                parts = [t.detach().double().flatten() for t in (out, *grads)]
                found.append(torch.cat([part / part.norm() for part in parts]))
        except Exception as error:  # A compiler raises whatever it likes.
            return f"{_NAME} failed for softcap, sinks or ALiBi ({type(error).__name__}: {str(error)[:200]})"
    distance = float((found[0] - found[1]).norm() / found[1].norm())
    return None if distance <= _BOUND else f"{_NAME} is off by {distance:.1e} for softcap, sinks or ALiBi"


@dataclass
class _KnownKeys:
    """A note on a batch: what its queries see for each kind of mask, which all layers share."""

    known: dict[tuple[Any, ...], tuple[Any, VisibleKeys]] = field(default_factory=dict)


def _keys_of(rows: list[Row], q: Tensor, causal: bool, reach: tuple[int, int] | None) -> VisibleKeys:
    batch = live_batch()
    length, device = q.shape[2], q.device
    if batch is None:
        return visible_keys(rows, q.shape[0], length, causal, reach, device)
    known = batch.notes.of(_KnownKeys).known
    key = (id(rows), causal, reach, length, device)
    if key not in known:
        # Together with the rows, so that nothing else gets their place in memory.
        known[key] = rows, visible_keys(rows, q.shape[0], length, causal, reach, device)
    return known[key][1]


def why_by_formula(q: Tensor, k: Tensor, v: Tensor, kernel: Kernel) -> str | None:
    """Why a call with softcap, sinks or ALiBi goes by the formula; None if `attend_fused` computes it.

    Args:
        q: (B, H, S, D), on a GPU.
        k: (B, heads, S, D).
        v: (B, heads, S, D_v).
        kernel: The arguments of the attention call.
    """
    return _KNOWN.reason(q, k, v, kernel)


def attend_fused(
    q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, rows: list[Row], causal: bool, reach: tuple[int, int] | None
) -> Tensor:
    """Attention with softcap, sinks or ALiBi in one kernel.

    Args:
        q: (B, H, S, D), on a GPU.
        k: (B, heads, S, D). The number of heads divides H.
        v: (B, heads, S, D_v).
        kernel: The arguments of the attention call.
        rows: Documents and kept keys of each row, or of the first row if all are equal.
        causal: Query i sees keys up to i.
        reach: How many keys before its own and how many after it a query sees.

    Returns:
        (B, H, S, D_v).
    """
    assert kernel.extras is not None
    note_kernel(q, _NAME)
    return fused(q, k, v, _keys_of(rows, q, causal, reach), kernel.extras, kernel.scale)
