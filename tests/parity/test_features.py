"""Features of attention that a split must keep: one step against one process, and what goes wrong without them."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from models import Block, HandWritten, count_targets, pair_batch
from nightly import mostly
from torch import Tensor, nn

from lightning_ulysses import UlyssesError, ulysses_attention
from lightning_ulysses.attention.explicit import Extras
from lightning_ulysses.testing import SplitRun, compare, fit_rank, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool, RemoteError

S, H = 33, 4


class Featured(HandWritten):
    """Every attention call uses what ``kind`` names."""

    def __init__(self, kind: str) -> None:
        super().__init__(heads=H, kv_heads=2)
        self.per_head = nn.Parameter(torch.linspace(0.2, 1.4, H))
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attend = partial(self.attend, kind)  # type: ignore[method-assign]

    def attend(self, kind: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        settings: dict[str, Any] = {
            "softcap": {"softcap": 0.3},
            "sinks": {"sinks": self.per_head},
            "alibi": {"alibi_slopes": self.per_head, "window": 9},
            "chunks": {"chunk": 10},
            "all": {"softcap": 0.5, "sinks": self.per_head, "alibi_slopes": self.per_head, "scale": 0.7},
        }.get(kind, {})
        if kind == "both sides":
            return ulysses_attention(q, k, v, window=(5, 3))
        return ulysses_attention(q, k, v, is_causal=True, **settings)


TWO, FOUR, BOTH = SplitRun(), SplitRun(4, 4, {"stage": 3}), SplitRun(4, 2)
RUNS = [
    *((kind, TWO) for kind in ("softcap", "alibi", "both sides", "all")),
    *((kind, FOUR) for kind in ("sinks", "chunks", "all")),
    ("all", BOTH),
]


@pytest.mark.parametrize(("kind", "run"), mostly(RUNS, [("all", TWO), ("all", FOUR)]))
def test_one_step(pool: ProcessPool, kind: str, run: SplitRun) -> None:
    make = partial(Featured, kind)
    batches = [pair_batch(seed, S, 2, "uneven") for seed in range(run.world_size // run.sp_size)]
    reference = fit_single(make, [batches], count_targets)
    plain = fit_single(partial(Featured, "none"), [batches], count_targets)
    assert compare(plain, reference).step > 1e-3
    for result in fit_split(pool, make, batches, run):
        assert compare(result, reference).largest <= 1e-5


def fit_with_the_first_heads(rank: int, kind: str) -> Any:
    def first(self: Extras, heads: slice) -> Extras:
        size = heads.stop - heads.start
        sinks, slopes = (None if t is None else t[:size] for t in (self.sinks, self.alibi_slopes))
        return Extras(self.softcap, sinks, slopes)

    with mock.patch.object(Extras, "heads", first):
        return fit_rank(rank, partial(Featured, kind), [pair_batch(0, S)], SplitRun())


@pytest.mark.parametrize("kind", ["sinks", "alibi"])
def test_values_of_other_heads_would_be_wrong(pool: ProcessPool, kind: str) -> None:
    reference = fit_single(partial(Featured, kind), [[pair_batch(0, S)]], count_targets)
    for result in pool.run(fit_with_the_first_heads, kind, world_size=2):
        assert compare(result, reference).step > 1e-3


class Attends(nn.Module):
    """Tokens attend to a memory, or to what ``pool`` makes of the tokens."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.kv = nn.Linear(32, 32), nn.Linear(32, 64)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        if self.kind == "multihead":
            return x + self.attention(x, memory, memory)[0]
        memory = x[:, ::2] if self.kind == "pooled" else memory
        # (B, S, 32) -> (B, 4, S, 8)
        q = self.q(x).unflatten(2, (4, 8)).transpose(1, 2)
        # (B, M, 64) -> 2 times (B, 4, M, 8)
        k, v = self.kv(memory).unflatten(2, (2, 4, 8)).permute(2, 0, 3, 1, 4)
        if self.kind == "explicit":
            out = ulysses_attention(q, k, v, softcap=2.0)
        else:
            mask = torch.arange(k.shape[2])[None] < 5 if self.kind == "masked" else None
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.kind == "causal")
        return x + out.transpose(1, 2).flatten(2)


class WithMemory(HandWritten):
    """A decoder with cross-attention to a memory that a small network makes on every rank."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.remember, self.cross = nn.Linear(6, 32), Attends(kind)

    def _loss(self, batch: Any) -> Tensor:
        x, y, memory = batch["x"], batch["y"], batch["memory"]
        hidden = self.embed(x) + self.place.weight[: x.shape[1]] * 0
        hidden = self.blocks[1](self.cross(self.blocks[0](hidden), self.remember(memory)))
        return F.cross_entropy(self.head(hidden).flatten(0, 1), y.flatten())


DIMS: dict[str, Any] = {"x": 1, "y": 1, "memory": None}


def memory_batch(seed: int, tokens: int) -> dict[str, Tensor]:
    x, y = pair_batch(seed, S, 2, "uneven")
    memory = torch.randn(2, tokens, 6, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "y": y, "memory": memory}


def count(batch: dict[str, Tensor]) -> float:
    return float((batch["y"] != -100).sum())


@pytest.mark.parametrize(
    ("kind", "run"),
    [
        ("sdpa", SplitRun(4, 2)),
        ("masked", SplitRun()),
        ("explicit", SplitRun()),
        ("multihead", SplitRun()),
        ("explicit", SplitRun(4, 2)),
        # Its keys depend on tokens of other slices: the submodule runs on the joined sequence.
        ("pooled", SplitRun()),
    ],
)
def test_a_memory_needs_no_exchange(pool: ProcessPool, kind: str, run: SplitRun) -> None:
    run = SplitRun(run.world_size, run.sp_size, {"sequence_dims": DIMS, "targets": "y"})
    batches = [memory_batch(seed, 11) for seed in range(run.world_size // run.sp_size)]
    reference = fit_single(partial(WithMemory, kind), [batches], count)
    for result in fit_split(pool, partial(WithMemory, kind), batches, run):
        assert compare(result, reference).largest <= 1e-5


def test_what_is_no_memory_is_refused(pool: ProcessPool) -> None:
    run = SplitRun(strategy={"sequence_dims": DIMS, "targets": "y", "split": "batch"})
    with pytest.raises(RemoteError) as caught:
        fit_split(pool, partial(WithMemory, "causal"), [memory_batch(0, 11)], run)
    wanted = ("causal attention of 1", "tokens to 11 keys", "leave is_causal out")
    assert [part for part in wanted if part not in str(caught.value)] == [], caught.value


def test_without_the_check_a_memory_has_to_be_told(pool: ProcessPool) -> None:
    run = SplitRun(strategy={"sequence_dims": DIMS, "targets": "y", "check_model": False})
    with pytest.raises(RemoteError, match=r"keys over 11 tokens(.|\n)*unsharded"):
        fit_split(pool, partial(WithMemory, "sdpa"), [memory_batch(0, 11)], run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 3}, "window=3 with is_causal=False"),
        ({"window": (-1, 2)}, r"window=\(-1, 2\)"),
        ({"window": 0, "is_causal": True}, "window=0"),
        ({"sinks": torch.zeros(2)}, r"sinks of shape \(2,\) for 4 query heads"),
        ({"alibi_slopes": torch.zeros(1, 4)}, r"alibi_slopes of shape \(1, 4\)"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    q = torch.zeros(1, 4, 5, 8)
    with pytest.raises(UlyssesError, match=message):
        ulysses_attention(q, q, q, **settings)
