"""Gradients that ranks make in other orders, or of other parameters."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from compiled import PAIRS, CompiledByHand, named_as
from exact import BOUND, fit_broken
from models import VOCAB, HandWritten, count_targets
from torch import Tensor, nn

from lightning_ulysses import UlyssesError, sequence_positions
from lightning_ulysses.exchange.mesh import SequenceMesh
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


class Forked(HandWritten):
    """Adds two branches after each block, in an order that differs between ranks; so does that of their gradients."""

    def __init__(self) -> None:
        super().__init__(lr=0.2)
        self.branches = nn.ModuleList(
            [nn.ModuleList([nn.Linear(32, 32), nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 32))]) for _ in self.blocks]
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.place(sequence_positions(x))
        turned = dist.is_initialized() and dist.get_rank() % 2 == 1
        for block, (left, right) in zip(self.blocks, self.branches, strict=True):
            h = block(h)
            if turned:
                added = right(h)
                h = h + (added + left(h))
            else:
                added = left(h)
                h = h + (added + right(h))
        return self.head(h)


# Full between the gradients of the two branches after the first block, and larger than what one exchange follows.
SMALL = {"reduce_bucket_size": 12900}


@pytest.mark.parametrize("strategy", [{"stage": 1, **SMALL}, {"stage": 2, "overlap_comm": True, **SMALL}])
def test_small_buckets_of_gradients_in_another_order(pool: ProcessPool, strategy: dict[str, Any]) -> None:
    reference = fit_single(Forked, [PAIRS[:1]], count_targets)
    for result in fit_split(pool, Forked, PAIRS[:1], SplitRun(strategy=strategy)):
        assert compare(result, reference).largest <= BOUND


def drop(self: Any, param: Any, i: int) -> None:
    self._take(param, i)


def refused_in_order_of_arrival(rank: int) -> str:
    with (
        mock.patch("lightning_ulysses.upstream.zero_buckets.GradientQueue.add", drop),
        pytest.raises(UlyssesError) as e,
    ):
        fit_rank(rank, Forked, PAIRS[:1], SplitRun(strategy={"stage": 2, **SMALL}))
    return str(e.value)


def test_in_order_of_arrival_their_buckets_differ(pool: ProcessPool) -> None:
    for text in pool.run(refused_in_order_of_arrival, world_size=2):
        assert "gradients on some ranks only" in text


def fit_beside_nccl(rank: int, run: SplitRun) -> tuple[StepResult, list[str]]:
    """As on a GPU: facts of the hosts travel over groups of their own, which are made and destroyed once."""
    seen: list[str] = []
    own, make, destroy, gather, reduce = (
        SequenceMesh.with_host_groups,
        dist.new_group,
        dist.destroy_process_group,
        dist.all_gather,
        dist.all_reduce,
    )
    groups: list[Any] = []

    def new_group(*args: Any, **kwargs: Any) -> Any:
        group = make(*args, **kwargs)
        if kwargs.get("backend") == "gloo":
            groups.append(group)
            seen.append("made")
        return group

    def destroyed(group: Any = None) -> None:
        if any(group is other for other in groups):
            seen.append("destroyed")
        destroy(group)

    def spy(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(f"{name} {'host' if any(kwargs.get('group') is g for g in groups) else 'device'}")
            return function(*args, **kwargs)

        return call

    with (
        mock.patch.object(SequenceMesh, "with_host_groups", lambda self, device_type: own(self, "cuda")),
        mock.patch.object(dist, "new_group", new_group),
        mock.patch.object(dist, "destroy_process_group", destroyed),
        mock.patch.object(dist, "all_gather", spy("all_gather", gather)),
        mock.patch.object(dist, "all_reduce", spy("all_reduce", reduce)),
    ):
        result = fit_rank(rank, partial(HandWritten, lr=0.2), PAIRS[:2], run)
    return result, seen


def test_facts_of_the_hosts_travel_beside_the_devices(pool: ProcessPool) -> None:
    run = SplitRun(4, 2, {"stage": 2, "check_model": False, "targets": "1"})
    reference = fit_single(partial(HandWritten, lr=0.2), [PAIRS[:2]], count_targets)
    for result, seen in pool.run(fit_beside_nccl, run, world_size=4):
        assert compare(result, reference).largest <= BOUND
        # The world, and one for each rank of a sequence-parallel group, of which this process is in one.
        assert seen.count("made") == 3 and seen.count("destroyed") == 2
        # The agreement before the bucket, and the targets over groups.
        assert "all_gather host" in seen and "all_reduce host" in seen
