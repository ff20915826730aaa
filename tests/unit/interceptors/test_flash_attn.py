"""flash-attn's and xformers' functions, stood in for by reference kernels of the same signatures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F
from models import Block, HandWritten, count_targets, pair_batch
from nightly import mostly
from torch import Tensor

from lightning_ulysses import UlyssesError
from lightning_ulysses.attention.attend import attend
from lightning_ulysses.attention.explicit import Extras
from lightning_ulysses.geometry.layout import cu_seqlens_to_runs
from lightning_ulysses.geometry.mask_spec import MaskSpec
from lightning_ulysses.testing import SplitRun, compare, fit_rank, fit_single
from lightning_ulysses.testing.processes import ProcessPool

S = 33


def reference(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: tuple[int, int], scale: Any, runs: Any, extras: Any = None
) -> Tensor:
    """(B, S, H, D); what lies outside of the package computes this."""
    spec = MaskSpec(causal, window[0] + 1 if window[0] >= 0 else None, runs, ahead=window[1])
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return attend(q, k, v, spec, scale=scale, extras=extras).transpose(1, 2)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    extras = Extras(softcap or None, alibi_slopes=alibi_slopes)
    return reference(q, k, v, causal, window_size, softmax_scale, None, extras)


def flash_attn_qkvpacked_func(
    qkv: Tensor, dropout_p: float = 0.0, causal: bool = False, return_attn_probs: bool = False
) -> Tensor:
    return reference(*qkv.unbind(2), causal, (-1, -1), None, None)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    runs = (cu_seqlens_to_runs(cu_seqlens_q.tolist(), len(q)),)
    return reference(q[None], k[None], v[None], causal, (-1, -1), None, runs)[0]


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """In place of torch's, which has no kernel for CPUs."""
    runs = (cu_seqlens_to_runs(cu_seq_q.tolist(), len(query)),)
    causal = window_size == (-1, 0)
    return reference(query[None], key[None], value[None], causal, window_size, scale, runs)[0]


class Fourth:
    """flash-attn 4 returns the log-sum-exp beside the output, or None."""

    @staticmethod
    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int | None, int | None] = (None, None),
        learnable_sink: Tensor | None = None,
        softcap: float = 0.0,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        extras = Extras(softcap or None, learnable_sink)
        return reference(q, k, v, causal, (-1, -1), softmax_scale, None, extras), None


class LowerTriangularMask:
    pass


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: float | None = None
) -> Tensor:
    mask = attn_bias if isinstance(attn_bias, Tensor) else None
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=attn_bias is not None and mask is None).transpose(
        1, 2
    )


KEPT: dict[str, Any] = {}


def install_fakes() -> None:
    flash, xformers, ops = ModuleType("flash_attn"), ModuleType("xformers"), ModuleType("xformers.ops")
    for function in (flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func):
        setattr(flash, function.__name__, function)
    ops.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    cute = ModuleType("flash_attn.cute")
    cute.flash_attn_func = Fourth.flash_attn_func  # type: ignore[attr-defined]
    sys.modules.update({"flash_attn": flash, "flash_attn.cute": cute, "xformers": xformers, "xformers.ops": ops})
    package = sys.modules["torch.nn.attention.varlen"]
    KEPT.setdefault("varlen_attn", package.varlen_attn)
    varlen_attn.__module__ = package.__name__
    package.varlen_attn = varlen_attn  # type: ignore[attr-defined]


def remove_fakes() -> None:
    """Other tests ask whether flash-attn is there."""
    for name in ("flash_attn", "flash_attn.cute", "xformers.ops", "xformers"):
        sys.modules.pop(name, None)
    package: Any = sys.modules["torch.nn.attention.varlen"]
    package.varlen_attn = KEPT.get("varlen_attn", package.varlen_attn)


@pytest.fixture(autouse=True)
def fakes() -> Iterator[None]:
    install_fakes()
    yield
    remove_fakes()


EDGES = torch.tensor([0, 9, 20, S], dtype=torch.int32)


SETTINGS: dict[str, Any] = {
    "softcap": {"softcap": 0.3, "causal": True},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.3, 0.2, 0.1])},
    "both sides": {"window_size": (3, 5)},
    "one side": {"window_size": (-1, 3)},
    "slopes of rows": {"alibi_slopes": torch.ones(1, 4)},
    "weights": {"return_attn_probs": True},
}


class Flash(HandWritten):
    """Attention by one of the functions, taken from its module or held under another name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        install_fakes()
        self.kind, self.held = kind, sys.modules["flash_attn"].flash_attn_func
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attend = self.attend  # type: ignore[method-assign]

    def attend(self, *heads: Tensor) -> Tensor:
        flash: Any = sys.modules["flash_attn"]
        # (B, H, S_r, D) -> (B, S_r, H, D)
        q, k, v = (t.transpose(1, 2) for t in heads)
        if self.kind == "causal":
            out = flash.flash_attn_func(q, k, v, 0.0, None, True)
        elif self.kind == "held":
            out = self.held(q, k, v, causal=True, softmax_scale=0.2)
        elif self.kind == "window":
            out = flash.flash_attn_func(q, k, v, causal=True, window_size=(6, 0))
        elif self.kind == "qkvpacked":
            out = flash.flash_attn_qkvpacked_func(torch.stack([q, k, v], dim=2), causal=True)
        elif self.kind == "varlen":
            rest = (EDGES, EDGES, 13, 13)
            out = flash.flash_attn_varlen_func(q[0], k[0], v[0], *rest, causal=True)[None]
        elif self.kind in SETTINGS:
            out = flash.flash_attn_func(q, k, v, **SETTINGS[self.kind])
        elif self.kind in ("torch varlen", "torch varlen, window"):
            sides = (-1, 0) if self.kind == "torch varlen" else (4, 2)
            package: Any = sys.modules["torch.nn.attention.varlen"]
            out = package.varlen_attn(q[0], k[0], v[0], EDGES, None, 13, 13, window_size=sides, scale=0.4)[None]
        elif self.kind == "fourth":
            fourth: Any = sys.modules["flash_attn.cute"]
            out, nothing = fourth.flash_attn_func(q, k, v, causal=True, learnable_sink=torch.ones(4), softcap=0.5)
            assert nothing is None
        elif self.kind == "local edges":
            edges = torch.tensor([0, q.shape[1]], dtype=torch.int32)
            out = flash.flash_attn_varlen_func(q[0], k[0], v[0], edges, edges, 9, 9)[None]
        else:
            bias = LowerTriangularMask() if self.kind == "xformers" else torch.ones(S, S).tril().log()
            out = sys.modules["xformers.ops"].memory_efficient_attention(q, k, v, attn_bias=bias)
        return out.transpose(1, 2)


def fit(rank: int, kind: str, run: SplitRun) -> Any:
    made: list[Flash] = []

    def make() -> Flash:
        made.append(Flash(kind))
        return made[0]

    result = fit_rank(rank, make, [pair_batch(seed, S) for seed in range(run.world_size // run.sp_size)], run)
    assert made[0].held is flash_attn_func is sys.modules["flash_attn"].flash_attn_func
    assert sys.modules["xformers.ops"].memory_efficient_attention is memory_efficient_attention
    assert sys.modules["torch.nn.attention.varlen"].varlen_attn is varlen_attn
    remove_fakes()
    return result


KINDS = ["causal", "held", "window", "qkvpacked", "varlen", "xformers", "xformers bias", "softcap", "alibi"]
KINDS += ["both sides", "torch varlen", "torch varlen, window", "fourth"]
FOUR = ["varlen", "xformers bias", "alibi", "torch varlen, window"]


WORLDS = [*((kind, 2) for kind in KINDS), *((kind, 4) for kind in FOUR)]


@pytest.mark.parametrize(("kind", "world"), mostly(WORLDS, [("varlen", 4), ("alibi", 4)]))
def test_one_step(pool: ProcessPool, kind: str, world: int) -> None:
    run = SplitRun(world, world)
    single = fit_single(partial(Flash, kind), [[pair_batch(0, S)]], count_targets)
    for result in pool.run(fit, kind, run, world_size=run.world_size):
        assert compare(result, single).largest <= 1e-5


REFUSED = {
    "weights": ("flash_attn_func with return_attn_probs", "plain softmax"),
    "one side": ("window_size=(-1, 3)", "limited on both sides"),
    "slopes of rows": ("alibi_slopes of shape (1, 4)", "one slope for each head"),
    "local edges": ("flash_attn_varlen_func on", "the cu_seqlens of the whole row"),
}


def refused(rank: int, kind: str) -> UlyssesError:
    # Tried, the model runs on the joined sequence where slices are refused.
    run = SplitRun(strategy={"check_model": False})
    with pytest.raises(UlyssesError) as caught:
        fit_rank(rank, partial(Flash, kind), [pair_batch(0, S)], run)
    remove_fakes()
    return caught.value


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_kept_is_refused(pool: ProcessPool, kind: str) -> None:
    for error in pool.run(refused, kind, world_size=2):
        assert [part for part in REFUSED[kind] if part not in str(error)] == [], error
