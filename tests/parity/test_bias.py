"""Masks and biases of the whole sequence, of which each rank uses those of its heads."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Block, HandWritten, count_targets, pair_batch
from nightly import mostly
from torch import Tensor, nn

from lightning_ulysses import ulysses_attention
from lightning_ulysses.attention.attend import attend
from lightning_ulysses.geometry.mask_spec import MaskSpec
from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool

S, H = 33, 4


class Biased(HandWritten):
    """A learned bias for each head and distance, ALiBi beside it, or a mask."""

    def __init__(self, kind: str, call: str) -> None:
        super().__init__(heads=H, kv_heads=2)
        torch.manual_seed(3)
        self.distance = nn.Parameter(torch.randn(H, 2 * S - 1))
        place = torch.arange(S)
        self.register_buffer("gap", place[:, None] - place, persistent=False)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attend = partial(self.attend, kind, call)  # type: ignore[method-assign]

    def attend(self, kind: str, call: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gap: Any = self.gap
        if kind == "learned":
            mask = self.distance[:, gap + S - 1]  # (H, S, S)
        elif kind == "alibi":
            slopes = 2.0 ** -torch.arange(1, H + 1)
            mask = torch.where(gap >= 0, -gap * slopes[:, None, None], float("-inf"))[None]  # (1, H, S, S)
        else:
            mask = (gap >= 0) | (gap.T + gap >= 0) & (torch.arange(S) < 5)  # (S, S), a prefix that all see
        if call == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return ulysses_attention(q, k, v, attn_mask=mask)


GROUPS = [("sdpa", SplitRun(4, 2))]


@pytest.mark.parametrize("kind", ["learned", "alibi", "prefix"])
@pytest.mark.parametrize(
    ("call", "run"), mostly([("sdpa", SplitRun()), ("explicit", SplitRun(4, 4)), ("sdpa", SplitRun(4, 2))], GROUPS)
)
def test_one_step(pool: ProcessPool, kind: str, call: str, run: SplitRun) -> None:
    make = partial(Biased, kind, call)
    batches = [pair_batch(seed, S, 2, "uneven") for seed in range(run.world_size // run.sp_size)]
    reference = fit_single(make, [batches], count_targets)
    for result in fit_split(pool, make, batches, run):
        assert compare(result, reference).largest <= 1e-5


def test_padding_by_the_strategy(pool: ProcessPool) -> None:
    make, batches = partial(Biased, "alibi", "sdpa"), [pair_batch(0, S)]
    reference = fit_single(make, [batches], count_targets)
    result = fit_split(pool, make, batches, SplitRun(strategy={"pad_to_multiple_of": 20}))[0]
    assert compare(result, reference).largest <= 1e-5


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_on_top_of_everything_else(kind: str) -> None:
    """Against a softmax over the scores with everything masked by hand."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    given = torch.randn(1, 2, 9, 9, dtype=torch.float64)
    given = given > -1 if kind == "bool" else given
    spec = MaskSpec(True, 4, (((0, 3), (3, 9)), ((0, 9),)), (((0, 9),), ((0, 6),)))
    keep = torch.zeros(2, 1, 9, 9, dtype=torch.bool)
    for row, documents in enumerate(spec.documents or ()):
        for begin, end in documents:
            for i in range(begin, end):
                for j in range(max(begin, i - 3), i + 1):
                    keep[row, 0, i, j] = row == 0 or j < 6
    scores = q @ k.transpose(2, 3) / 2
    scores = scores.masked_fill(~given, float("-inf")) if kind == "bool" else scores + given
    wanted = scores.masked_fill(~keep, float("-inf")).softmax(-1) @ v
    found = attend(q, k, v, spec, bias=given)
    seen = (keep & given if kind == "bool" else keep.expand(2, 2, 9, 9)).any(-1)
    torch.testing.assert_close(found[seen], wanted[seen])
    assert seen.float().mean() > 0.7
