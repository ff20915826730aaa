"""Submodules in which tokens meet run on the joined sequence or with a halo: one step is the step of one process."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import meeting
import pytest
import torch.distributed as dist
import torch.nn.functional as F
from exact import BOUND, fit_broken
from meeting import Layered, layered
from models import count_targets, pair_batch
from nightly import mostly, sampled
from torch import Tensor, nn

from lightning_ulysses.exchange import halo
from lightning_ulysses.testing import SplitRun, compare, fit_rank, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool

PAIRS = [pair_batch(seed, 33, 2, "uneven") for seed in range(4)]
TWICE = {"accumulate_grad_batches": 2}
TWO, FOUR = SplitRun(trainer=TWICE), SplitRun(4, 4, {"stage": 3, "split": "batch"}, TWICE)
GROUPS = SplitRun(4, 2, {"stage": 1}, TWICE)
PADDED = SplitRun(4, 4, {"pad_to_multiple_of": 12}, TWICE)
ALONE = {"attends": False}

CASES: dict[str, tuple[Any, SplitRun]] = {
    "causal convolution": (layered(meeting.CausalConv), TWO),
    "causal convolution, groups": (layered(meeting.CausalConv), GROUPS),
    "causal convolution alone": (layered(meeting.CausalConv, **ALONE), TWO),
    "causal convolution, padded": (layered(meeting.CausalConv), PADDED),
    "halo longer than a slice": (layered(partial(meeting.CausalConv, kernel=5, dilation=3)), FOUR),
    "zeros before": (layered(partial(meeting.PaddedConv, before=4, after=0)), FOUR),
    "zeros on both sides": (layered(partial(meeting.PaddedConv, before=2, after=2)), TWO),
    "zeros behind": (layered(partial(meeting.PaddedConv, before=0, after=4)), TWO),
    "centred, checkpointed": (layered(meeting.Centred, checkpoints=True), FOUR),
    "centred, padded": (layered(meeting.Centred), PADDED),
    "mirrored": (layered(meeting.Mirrored), TWO),
    "batch norm": (layered(meeting.Norm), TWO),
    "GRU, checkpointed": (layered(meeting.Recurrent, checkpoints=True), FOUR),
    "GRU, groups": (layered(meeting.Recurrent, checkpoints=True), GROUPS),
    "LSTM alone": (layered(partial(meeting.Recurrent, kind=nn.LSTM), **ALONE), TWO),
    "means": (layered(meeting.Means), TWO),
    "token shift": (layered(meeting.Shifted), TWO),
    "Fourier transform alone": (layered(meeting.Fourier, **ALONE), FOUR),
    "gate": (layered(meeting.Gate), TWO),
    "gate, padded": (layered(meeting.Gate), PADDED),
    "attention by hand alone": (layered(meeting.ByHand, **ALONE), TWO),
    "rotary inside attention": (layered(meeting.Rotated), TWO),
    "weights of places": (layered(partial(meeting.TokenMixing, length=33)), TWO),
}


# The same kinds of submodules in other worlds or at another place.
SELDOM = (
    *("causal convolution, groups", "causal convolution alone", "causal convolution, padded", "zeros before"),
    *("zeros behind", "centred, checkpointed", "GRU, groups", "gate, padded", "Fourier transform alone"),
    *("LSTM alone", "means"),
)


@pytest.mark.parametrize("case", mostly(CASES, SELDOM))
def test_one_step(pool: ProcessPool, case: str) -> None:
    make, run = CASES[case]
    check(pool, make, run)


def check(pool: ProcessPool, make: Any, run: SplitRun) -> None:
    batches = PAIRS[: 2 * run.world_size // run.sp_size]
    reference = fit_single(make, [batches], count_targets)
    assert reference.step().norm() > 1e-3
    for result in fit_split(pool, make, batches, run):
        assert compare(result, reference).largest <= BOUND, compare(result, reference)


def test_a_slice_without_labels(pool: ProcessPool) -> None:
    make, batches = layered(meeting.Recurrent), [pair_batch(1, 33, 2, "first_half")]
    reference = fit_single(make, [batches], count_targets)
    for result in fit_split(pool, make, batches, SplitRun()):
        assert compare(result, reference).largest <= BOUND


class Rows(Layered):
    """A loss that slices do not add up to, so that the model is split inside."""

    def _loss(self, batch: Any) -> Tensor:
        x, y = batch
        each = F.cross_entropy(self(x).transpose(1, 2), y, reduction="none")
        return (each.sum(1) / (y != -100).sum(1).clamp(min=1)).square().mean()


@pytest.mark.parametrize(
    "make", [meeting.CausalConv, meeting.Recurrent, meeting.Rotated], ids=lambda kind: kind.__name__
)
def test_inside_of_blocks(pool: ProcessPool, make: Any) -> None:
    make = partial(Rows, make)
    reference = fit_single(make, [PAIRS[:1]], lambda batch: 1.0)
    for result, said in pool.run(fit_and_listen, make, PAIRS[:1], SplitRun(), world_size=2):
        assert compare(result, reference).largest <= BOUND, compare(result, reference)
        assert not said or ("splits blocks.*" in said[0] and "blocks.*.mixer" in said[0].split("forbids it.")[1]), said


def fit_and_listen(rank: int, make: Any, batches: list[Any], run: SplitRun) -> tuple[Any, list[str]]:
    said: list[str] = []
    with mock.patch("lightning_ulysses.strategy.rank_zero_info", said.append):
        result = fit_rank(rank, make, batches, run)
    return result, [line for line in said if "steps of 'train'" in line]


SAID: dict[str, tuple[Any, str]] = {
    "halo": (meeting.CausalConv, "blocks.*.mixer.conv (Conv1d) get the few tokens that they reach"),
    "joined": (meeting.Norm, "in blocks.*.mixer.norm (BatchNorm1d): every rank runs that on the whole sequence"),
    "smallest": (meeting.Rotated, "in blocks.*.mixer.rotary (Turn):"),
    "not divided": (meeting.Shifted, "in blocks.*.mixer (Shifted):"),
}


@pytest.mark.parametrize("case", SAID)
def test_one_line_says_what_is_not_divided(pool: ProcessPool, case: str) -> None:
    kind, part = SAID[case]
    (_, said), (_, silent) = pool.run(fit_and_listen, layered(kind), PAIRS[:1], SplitRun(), world_size=2)
    assert len(said) == 1 and part in said[0] and silent == [], said


def sizes(rank: int, make: Any, run: SplitRun) -> list[list[int]]:
    """The elements that this rank sends to each other one in the exchanges of halos, forward and backward."""
    sent: list[list[int]] = []
    original = dist.all_to_all_single

    def count(out: Tensor, given: Tensor, out_sizes: list[int], in_sizes: list[int], **settings: Any) -> Any:
        sent.append(list(in_sizes))
        return original(out, given, out_sizes, in_sizes, **settings)

    with mock.patch.object(halo.dist, "all_to_all_single", count):
        fit_rank(rank, make, PAIRS[:1], run)
    return sent


def test_a_halo_is_all_that_travels(pool: ProcessPool) -> None:
    """A causal convolution of width 4 sends three tokens to the next rank, and their gradients come back."""
    rows, width, tokens = 2, 32, 3
    sent = pool.run(sizes, layered(meeting.CausalConv, **ALONE), SplitRun(4, 4), world_size=4)
    for rank, exchanges in enumerate(sent):
        forward = [rows * width * tokens * (other == rank + 1) for other in range(4)]
        backward = [rows * width * tokens * (other == rank - 1) for other in range(4)]
        assert exchanges and {tuple(each) for each in exchanges} <= {tuple(forward), tuple(backward)}, exchanges
        assert exchanges[-4:] == [forward, forward, backward, backward]


def test_the_same_without_the_check_trains_wrongly(pool: ProcessPool) -> None:
    for kind in (meeting.CausalConv, meeting.Norm):
        reference = fit_single(layered(kind), [PAIRS[:1]], count_targets)
        run = SplitRun(strategy={"check_model": False})
        assert compare(fit_split(pool, layered(kind), PAIRS[:1], run)[0], reference).step > 1e-3


def own_slice(whole: Tensor, dim: int, shares: Any, rank: int, group: Any) -> Tensor:
    """A join's backward that forgets what the other ranks' losses ask of this slice."""
    return whole.narrow(dim, sum(shares[:rank]), shares[rank])


def without_gradients(part: Tensor, dim: int, fetch: Any) -> Tensor:
    """A halo whose tokens send no gradients back."""
    begin = fetch.edges[fetch.rank] - fetch.wanted[fetch.rank][0]
    found = halo.fetched(part.detach(), dim, fetch).clone()
    found.narrow(dim, begin, part.shape[dim]).copy_(part)
    return found


CONTROLS: dict[str, tuple[Any, str, Any]] = {
    "join without the sum": (meeting.Recurrent, "lightning_ulysses.exchange.cut_and_join.sum_slices", own_slice),
    "halo without gradients": (meeting.CausalConv, "lightning_ulysses.regions.joints.fetched", without_gradients),
}


@pytest.mark.parametrize("mechanism", CONTROLS)
def test_negative_control(pool: ProcessPool, mechanism: str) -> None:
    kind, target, replacement = CONTROLS[mechanism]
    reference = fit_single(layered(kind), [PAIRS[:1]], count_targets)
    for result in pool.run(fit_broken, layered(kind), PAIRS[:1], SplitRun(), target, replacement, world_size=2):
        assert compare(result, reference).step > 100 * BOUND


BLOCKS = {"split": {"blocks.*": {"h": 1}}, "join": {"head": 1}}
PLANS: dict[str, tuple[Any, dict[str, Any]]] = {
    "whole": (meeting.Recurrent, {"whole": {"blocks.*.mixer": {"h": 1}}}),
    "whole, with outputs": (
        meeting.Recurrent,
        {"whole": {"blocks.*.mixer.cells": {"inputs": {"input": 1}, "outputs": {0: 1}}}},
    ),
    "halo": (meeting.CausalConv, {"halo": {"blocks.*.mixer.conv": 2}}),
    "halo between zeros": (
        partial(meeting.PaddedConv, before=2, after=2),
        {"halo": {"blocks.*.mixer.conv": {"dim": -1, "padded": "both"}}},
    ),
    "whole inside of blocks": (meeting.Recurrent, {**BLOCKS, "whole": {"blocks.*.mixer": {"h": 1}}}),
    "halo inside of blocks": (meeting.CausalConv, {**BLOCKS, "halo": {"blocks.*.mixer.conv": 2}}),
    "attention is whole": (meeting.Rotated, {"whole": {"blocks.*": {"h": 1}}}),
    "only the MLPs are split": (
        meeting.Rotated,
        {"split": {"blocks.*.rest.mlp": {0: 1}}, "join": {"blocks.*.rest.mlp": 1}},
    ),
}


@pytest.mark.parametrize("case", sampled(PLANS, 2))
def test_plans_by_hand(pool: ProcessPool, case: str) -> None:
    kind, plan = PLANS[case]
    check(pool, layered(kind), SplitRun(strategy={"plan": plan}, trainer=TWICE))


def test_a_plan_that_joins_nothing(pool: ProcessPool) -> None:
    plan = {"split": {"blocks.*": {"h": 1}}, "whole": {"0": None, "blocks.*.mixer": {"h": 1}}}
    check(pool, layered(meeting.Recurrent), SplitRun(strategy={"plan": plan}, trainer=TWICE))
