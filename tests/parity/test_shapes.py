"""Shapes that attention and batches may have: one step is the step of one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from exact import BOUND, fit_broken
from models import VOCAB, Block, HandWritten, count_targets, pair_batch
from nightly import sampled
from torch import Tensor, nn

from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool

S, H = 33, 6
TWICE = {"accumulate_grad_batches": 2}


class Grouped(HandWritten):
    """Queries (B, H_kv, groups, S, D)."""

    def __init__(self, mask: str = "") -> None:
        super().__init__(heads=H, kv_heads=2)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attend = partial(self.attend, mask)  # type: ignore[method-assign]

    def attend(self, kind: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.unflatten(1, (2, -1))
        mask = None
        if kind == "keys":
            # (B, S_r) -> (B, 1, 1, 1, S_r)
            mask = self.keep[:, None, None, None]
        elif kind == "heads":
            mask = torch.linspace(-3, 3, H * S * S).view(2, -1, S, S)
        out = F.scaled_dot_product_attention(q, k[:, :, None], v[:, :, None], attn_mask=mask, is_causal=not kind)
        return out.flatten(1, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.keep = batch[0] % 7 != 0
        return super().training_step(batch, batch_idx)


class Keys(HandWritten):
    """A mask over keys, from the tokens of the batch or of the whole sequence."""

    def __init__(self, kind: str) -> None:
        super().__init__(heads=H, kv_heads=H)
        self.kind = kind
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attend = self.attend  # type: ignore[method-assign]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        keep, whole = batch[0] % 7 != 0, torch.arange(S) % 5 != 2
        scale = torch.linspace(-1, 2, H)
        self.mask = {
            "B, 1, 1, S_r": keep[:, None, None],
            "B, H, 1, S_r": keep.float()[:, None, None] * scale[:, None, None],
            "1, H, 1, S_r": keep[:1].float()[:, None, None] * scale[:, None, None],
            "1, S_r": keep[:1],
            "1, S": whole[None],
            "1, 1, 1, S": whole[None, None, None],
            "1, H, 1, S": (whole.float() * scale[:, None])[None, :, None],
            "H, 1, S": (whole.float() * scale[:, None])[:, None],
        }[self.kind]
        return super().training_step(batch, batch_idx)


KINDS = ["B, 1, 1, S_r", "B, H, 1, S_r", "1, H, 1, S_r", "1, S_r", "1, S", "1, 1, 1, S", "1, H, 1, S", "H, 1, S"]
PAIRS = [pair_batch(seed, S, 2, "uneven") for seed in (1, 2)]
TWO, FOUR = SplitRun(trainer=TWICE), SplitRun(4, 4, trainer=TWICE)
CASES: dict[str, tuple[Any, SplitRun]] = {
    "five dimensions": (Grouped, TWO),
    "five dimensions, keys": (partial(Grouped, "keys"), FOUR),
    "five dimensions, heads": (partial(Grouped, "heads"), TWO),
    **{kind: (partial(Keys, kind), FOUR if index % 3 == 0 else TWO) for index, kind in enumerate(KINDS)},
}


def check(pool: ProcessPool, make: Any, batches: list[Any], run: SplitRun, count: Any = count_targets) -> None:
    reference = fit_single(make, [batches], count)
    assert reference.step().norm() > 1e-3
    for result in fit_split(pool, make, batches, run):
        assert compare(result, reference).largest <= BOUND, compare(result, reference)


@pytest.mark.parametrize("case", sampled(CASES, 2, ["five dimensions, keys"]))
def test_attention(pool: ProcessPool, case: str) -> None:
    make, run = CASES[case]
    check(pool, make, PAIRS, run)


def own_mask(lead: Any, heads: int, mask: Tensor) -> None:
    return None


def test_control(pool: ProcessPool) -> None:
    """Without its mask, attention of five dimensions is another one."""
    run = SplitRun(strategy={"check_model": False})
    reference = fit_single(partial(Grouped, "keys"), [PAIRS[:1]], count_targets)
    target = "lightning_ulysses.interceptors.torch_sdpa._flat_mask"
    for result in pool.run(fit_broken, partial(Grouped, "keys"), PAIRS[:1], run, target, own_mask, world_size=2):
        assert compare(result, reference).step > 1e-3


class Steps(L.LightningModule):
    """Several tokens per time step, which become one sequence inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.place, self.kind = nn.Embedding(VOCAB, 32), nn.Embedding(64, 32), nn.Embedding(3, 32)
        self.blocks = nn.ModuleList([Block(32, 4, 4, "causal") for _ in range(2)])
        self.head = nn.Linear(32, VOCAB)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch["x"], batch["y"]
        # (B, T, N) -> (B, T, N, W) -> (B, T * N, W)
        places = self.place(torch.arange(x.shape[1]))[:, None] + self.kind.weight
        hidden = (self.embed(x) + places).flatten(1, 2)
        for block in self.blocks:
            hidden = block(hidden)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), y.flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def steps(seed: int) -> dict[str, Tensor]:
    x, y = pair_batch(seed, 3 * 17, 2, "uneven")
    return {"x": x.view(2, 17, 3), "y": y.view(2, 17, 3)}


def count_y(batch: dict[str, Tensor]) -> float:
    return float((batch["y"] != -100).sum())


@pytest.mark.parametrize("dims", [{"x": 1, "y": 1}, None], ids=["named", "unnamed"])
def test_several_tokens_per_step(pool: ProcessPool, dims: Any) -> None:
    run = SplitRun(strategy={"sequence_dims": dims} if dims else {}, trainer=TWICE)
    # Of tensors that nothing names, no targets are known: micro-batches have equal weights, as in plain Lightning.
    check(pool, Steps, [steps(1), steps(2)], run, count_y if dims else lambda batch: 1.0)


class Forecast(L.LightningModule):
    """Batches as those of pytorch-forecasting: inputs in a mapping, and targets with weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.about, self.last = nn.Linear(5, 32), nn.Linear(3, 32), nn.Linear(32, 1)
        self.blocks = nn.ModuleList([Block(32, 4, 4, "causal") for _ in range(2)])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, (target, _) = batch
        hidden = self.first(inputs["encoder_cont"]) + self.about(inputs["static"])[:, None]
        for block in self.blocks:
            hidden = block(hidden)
        return F.mse_loss(self.last(hidden).squeeze(-1), target)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def series(seed: int, length: int = S) -> Any:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, length, 5, generator=generator)
    static = torch.randn(2, 3, generator=generator)
    return {"encoder_cont": values, "static": static}, (values.mean(-1).roll(-1, 1), None)


NESTED: dict[str, dict[str, Any]] = {
    "named": {"sequence_dims": {"0.encoder_cont": 1, "1.0": 1}, "split": "batch"},
    "found": {},
}


@pytest.mark.parametrize("case", NESTED)
def test_nested_batches(pool: ProcessPool, case: str) -> None:
    check(pool, Forecast, [series(1), series(2)], SplitRun(strategy=NESTED[case], trainer=TWICE), lambda batch: 1.0)
