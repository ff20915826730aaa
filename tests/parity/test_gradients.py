"""Gradients that ranks make in other orders, or of other parameters."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from compiled import PAIRS, CompiledByHand, named_as
from exact import BOUND, fit_broken
from models import VOCAB, HandWritten, count_targets
from torch import Tensor, nn

from lightning_ulysses import UlyssesError, sequence_positions
from lightning_ulysses.testing import SplitRun, StepResult, compare, fit_rank, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool


class Mixture(nn.Module):
    """Sends low tokens to one expert and high ones to the other, if there are any."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        out = h
        for index, expert in enumerate(self.experts):
            rows, cols = torch.where((x < 30) == (index == 0))
            if len(rows):
                out = out.index_put((rows, cols), expert(h[rows, cols]), accumulate=True)
        return out


class Experts(HandWritten):
    def __init__(self, leaf: bool = False) -> None:
        super().__init__(lr=0.2)
        self.mixture = Mixture(32)
        if leaf:
            from deepspeed.utils import set_z3_leaf_modules

            set_z3_leaf_modules(self, [Mixture])

    def forward(self, x: Tensor) -> Tensor:
        h = self.mixture(self.embed(x) + self.place(sequence_positions(x)), x)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def sorted_batch(seed: int, low: int) -> tuple[Tensor, Tensor]:
    """S = 33 tokens, of which the first ``low`` go to the first expert."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, 30, (2, low), generator=generator)
    rest = torch.randint(30, VOCAB, (2, 33 - low), generator=generator)
    return torch.cat([first, rest], dim=1), torch.randint(0, VOCAB, (2, 33), generator=generator)


BATCHES = [sorted_batch(1, 17), sorted_batch(2, 33)]
RUNS = {
    "zero 1": SplitRun(strategy={"stage": 1}),
    "zero 2, two micro-batches": SplitRun(trainer={"accumulate_grad_batches": 2}),
    "zero 1, two groups": SplitRun(4, 2, {"stage": 1}),
    "zero 1, overlapped, two micro-batches": SplitRun(
        strategy={"stage": 1, "overlap_comm": True}, trainer={"accumulate_grad_batches": 2}
    ),
}


@pytest.mark.parametrize("case", RUNS)
def test_experts_that_no_token_of_a_slice_chose(pool: ProcessPool, case: str) -> None:
    run = RUNS[case]
    batches = BATCHES if case != "zero 1" else BATCHES[:1]
    reference = fit_single(Experts, [batches], count_targets)
    for result in fit_split(pool, Experts, batches, run):
        assert compare(result, reference).largest <= BOUND


def test_leaf_modules_under_zero_3(pool: ProcessPool) -> None:
    reference = fit_single(Experts, [BATCHES[:1]], count_targets)
    for result in fit_split(pool, partial(Experts, True), BATCHES[:1], SplitRun(strategy={"stage": 3})):
        assert compare(result, reference).largest <= BOUND


def nothing(*args: Any) -> None:
    pass


def test_without_the_agreement_the_step_is_wrong(pool: ProcessPool) -> None:
    reference = fit_single(Experts, [BATCHES[:1]], count_targets)
    target = "lightning_ulysses.strategy.agree_on_gradients"
    for result in pool.run(fit_broken, Experts, BATCHES[:1], SplitRun(), target, nothing, world_size=2):
        assert compare(result, reference).step > 0.1


def refused(rank: int, run: SplitRun) -> str:
    with pytest.raises(UlyssesError) as caught:
        fit_rank(rank, Experts, BATCHES[:1], run)
    return str(caught.value)


def test_parts_that_would_hold_other_parameters_are_refused(pool: ProcessPool) -> None:
    numbers = sum(parameter.numel() for parameter in Experts().parameters())
    for text in pool.run(refused, SplitRun(strategy={"reduce_bucket_size": 4096}), world_size=2):
        assert "mixture.experts" in text and f"reduce_bucket_size={numbers}" in text


def fit_partly_compiled(rank: int, run: SplitRun) -> StepResult:
    """Compiled graphs on one rank alone give their gradients in another order than the other rank makes them."""
    torch.compiler.reset()
    with torch.compiler.set_stance("force_eager" if rank == 0 else "default"):
        return fit_rank(rank, partial(CompiledByHand, "blocks"), PAIRS[:1], run)


@pytest.mark.parametrize("strategy", [{"stage": 1}, {"stage": 2, "contiguous_gradients": False}, {"stage": 3}])
def test_gradients_in_another_order(pool: ProcessPool, strategy: dict[str, Any]) -> None:
    reference = fit_single(partial(HandWritten, lr=0.2), [PAIRS[:1]], count_targets)
    for result in pool.run(fit_partly_compiled, SplitRun(strategy=strategy), world_size=2):
        assert compare(named_as(result, reference), reference).largest <= BOUND
