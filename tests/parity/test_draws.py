"""One step that draws random numbers, on several processes against one with the same seed."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from exact import BOUND
from models import VOCAB, HandWritten, count_targets, pair_batch
from torch import Tensor, nn
from torch.nn.functional import dropout as early_bound

from lightning_ulysses.interceptors.draw_table import DrawTable
from lightning_ulysses.testing import SplitRun, compare, fit_rank, fit_single
from lightning_ulysses.testing.processes import ProcessPool

SEED = 5
# S is odd, so that one rank of a group draws for more tokens than the other.
BATCHES = [pair_batch(seed, 33, 2, "uneven") for seed in range(2)]


class Drawing(HandWritten):
    """A step, a model or a hook that draws."""

    def __init__(self, kind: str, compiled: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kind = kind
        self.random = torch.Generator().manual_seed(3)
        if kind == "dropout":
            for block in self.blocks:
                block.mlp = nn.Sequential(block.mlp, nn.Dropout(0.2))
                if compiled:
                    block.compile(backend="eager")
        if kind == "hook":
            self.embed.register_forward_hook(self.disturb)

    def disturb(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """NEFTune."""
        size = 5 / math.sqrt(output.shape[1] * output.shape[2])
        return output + torch.zeros_like(output).uniform_(-size, size)

    def logits(self, x: Tensor, noise: Any = None) -> Tensor:
        if noise is None:
            return self(x)
        hook = self.embed.register_forward_hook(lambda module, args, output: noise(output))
        try:
            return self(x)
        finally:
            hook.remove()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if self.kind in NOISES:
            y = y.masked_fill(y == -100, 0) if self.kind == "generator" else y
            logits = self.logits(x, partial(NOISES[self.kind], self))
        elif self.kind == "diffusion":
            rate = torch.rand(len(x), 1).clamp(min=0.2)
            mask = torch.rand(x.shape) < rate
            each = F.cross_entropy(self(x.masked_fill(mask, 0)).transpose(1, 2), x, reduction="none")
            return (each * mask / rate).sum() / x.numel()
        elif self.kind == "mlm":
            mask = torch.bernoulli(torch.full(x.shape, 0.3)).bool()
            random = torch.randint(VOCAB, x.shape)
            x, y = torch.where(mask, random, x), x.masked_fill(~mask, -100)
            logits = self(x)
        else:
            logits = self(x)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def flattened(module: Any, hidden: Tensor) -> Tensor:
    # (B, S, W) -> (B * S, W) -> (B, S, W)
    return hidden + 0.1 * early_bound(torch.randn_like(hidden.flatten(0, 1)), 0.2).view_as(hidden)


def spread(module: Any, hidden: Tensor) -> Tensor:
    # (B, W, S): whole channels, and tokens, are dropped; then noise in another order of memory
    dropped = F.dropout1d(hidden.transpose(1, 2), 0.2).transpose(1, 2)
    dropped = F.alpha_dropout(F.dropout1d(dropped, 0.1), 0.1)
    return dropped + 0.1 * torch.rand_like(hidden.transpose(0, 1)).transpose(0, 1)


def sampled(module: Any, hidden: Tensor) -> Tensor:
    chosen = torch.multinomial(hidden.detach().flatten(0, 1).softmax(-1), 2).sum(-1).view(*hidden.shape[:2], 1)
    noise = torch.distributions.Normal(torch.zeros(hidden.shape), 0.1).sample()
    level = torch.rand(len(hidden), 1, 1)
    return hidden + level * noise + 0.01 * chosen + 0.1 * F.gumbel_softmax(hidden.detach())


NOISES: dict[str, Any] = {
    "randn_like": lambda module, hidden: hidden + 0.1 * torch.randn_like(hidden),
    "generator": lambda module, hidden: hidden + 0.1 * torch.randn(hidden.shape, generator=module.random),
    "flattened": flattened,
    "spread": spread,
    "sampled": sampled,
}


def seeded(module: Any, hidden: Tensor) -> Tensor:
    torch.manual_seed(7)
    return hidden + torch.empty_like(hidden).normal_(std=0.1)


NOISES["seeded"] = seeded


def numbers(batch: Any) -> float:
    return float(batch[0].numel())


def count(kind: str) -> Any:
    return {"diffusion": numbers, "mlm": lambda batch: 1.0, "generator": numbers}.get(kind, count_targets)


def fit(rank: int, make: Any, batches: list[Any], run: SplitRun, is_cut: bool = True) -> Any:
    """`fit_rank` with a seed; draws are those of each rank's own generators unless ``is_cut``."""
    L.seed_everything(SEED, verbose=False)
    if is_cut:
        return fit_rank(rank, make, batches, run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DrawTable, "find", lambda *args: None)
        return fit_rank(rank, make, batches, run)


CASES: dict[str, SplitRun] = {
    **dict.fromkeys(("dropout", "hook", *NOISES), SplitRun()),
    "diffusion": SplitRun(trainer={"accumulate_grad_batches": 2}),
    "mlm": SplitRun(),
}


def check(pool: ProcessPool, make: Any, kind: str, run: SplitRun, batches: list[Any]) -> None:
    seed = None if kind in ("generator", "seeded") else SEED
    wanted = fit_single(make, [batches], count(kind), seed=seed, dp_size=run.world_size // run.sp_size)
    for result in pool.run(fit, make, batches, run, world_size=run.world_size):
        assert compare(result, wanted).largest <= BOUND, compare(result, wanted)


@pytest.mark.parametrize("kind", CASES)
def test_kinds(pool: ProcessPool, kind: str) -> None:
    run = CASES[kind]
    check(pool, partial(Drawing, kind), kind, run, BATCHES[: run.trainer.get("accumulate_grad_batches", 1)])


def test_rows_of_other_groups_draw_others(pool: ProcessPool) -> None:
    for kind in ("dropout", "sampled"):
        check(pool, partial(Drawing, kind), kind, SplitRun(4, 2), BATCHES)


def test_compiled_blocks_draw_outside_of_their_graphs(pool: ProcessPool) -> None:
    wanted = fit_single(partial(Drawing, "dropout"), [BATCHES[:1]], count_targets, seed=SEED)
    for result in pool.run(fit, partial(Drawing, "dropout", True), BATCHES[:1], SplitRun(), world_size=2):
        assert compare(result, wanted).largest <= BOUND


def test_four_slices(pool: ProcessPool) -> None:
    check(pool, partial(Drawing, "flattened"), "flattened", SplitRun(4, 4), BATCHES[:1])


def test_one_process_with_the_strategy(pool: ProcessPool) -> None:
    check(pool, partial(Drawing, "sampled"), "sampled", SplitRun(1, 1), BATCHES[:1])


@pytest.mark.parametrize(
    "settings", [{"check_model": False}, {"split": "blocks"}, {"pad_to_multiple_of": 8}, {"stage": 3}], ids=str
)
def test_settings(pool: ProcessPool, settings: dict[str, Any]) -> None:
    check(pool, partial(Drawing, "dropout"), "dropout", SplitRun(strategy=settings), BATCHES[:1])


def test_repeated_forwards_draw_the_same_again(pool: ProcessPool) -> None:
    for settings in ({}, {"split": "blocks"}):
        make = partial(Drawing, "dropout", checkpointing=True)
        check(pool, make, "dropout", SplitRun(strategy=settings), BATCHES[:1])


@pytest.mark.parametrize("kind", ["dropout", "flattened", "diffusion"])
def test_draws_of_each_slice_by_itself_are_not_those_of_one_process(pool: ProcessPool, kind: str) -> None:
    # Without the trial, which would split inside where draws are whole, or refuse.
    run = SplitRun(strategy={"check_model": False, "targets": "tokens" if kind == "diffusion" else None})
    wanted = fit_single(partial(Drawing, kind), [BATCHES[:1]], count(kind), seed=SEED)
    for result in pool.run(fit, partial(Drawing, kind), BATCHES[:1], run, False, world_size=2):
        assert compare(result, wanted).step > 1e-3
