"""Clipping where users ask for it, and optimizers that ZeRO cannot run exactly."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from exact import BOUND
from models import HandWritten, count_targets, pair_batch
from nightly import mostly
from torch import Tensor

from lightning_ulysses import UlyssesError
from lightning_ulysses.checks.optimizer import check_elementwise
from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool

PAIRS = [pair_batch(seed, 33, 2, "uneven") for seed in range(2)]


class ClipsByHand(HandWritten):
    def __init__(self) -> None:
        super().__init__(manual=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        if self._trainer is not None:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            optimizer.step()
        return loss


class ClipsInHook(HandWritten):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")


@pytest.mark.parametrize("make", [ClipsByHand, ClipsInHook])
@pytest.mark.parametrize("stage", mostly([1, 2, 3], [1, 2]))
def test_clipping_is_real(pool: ProcessPool, make: Any, stage: int) -> None:
    wanted = fit_single(HandWritten, [[batch] for batch in PAIRS], count_targets, clip=0.1)
    unclipped = fit_single(HandWritten, [[batch] for batch in PAIRS], count_targets)
    for result in fit_split(pool, make, PAIRS, SplitRun(strategy={"stage": stage})):
        assert compare(result, wanted).step <= BOUND < compare(result, unclipped).step


class Grouped(HandWritten):
    """Steps Adagrad with a learning rate of the group, which is not that of the optimizer."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adagrad(
            [{"params": [*self.parameters()], "lr": 0.01}], lr=0.5, initial_accumulator_value=0.1
        )


@pytest.mark.parametrize("stage", mostly([1, 2, 3], [1]))
def test_adagrad_keeps_its_groups(pool: ProcessPool, stage: int) -> None:
    wanted = fit_single(Grouped, [[batch] for batch in PAIRS], count_targets)
    for result in fit_split(pool, Grouped, PAIRS, SplitRun(strategy={"stage": stage})):
        assert compare(result, wanted).step <= BOUND


class ClipsByValue(HandWritten):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="value")


class Stepping(HandWritten):
    def __init__(self, what: str) -> None:
        super().__init__(manual=what == "two")
        self.what = what

    def configure_optimizers(self) -> Any:
        if self.what == "none":
            return None
        if self.what == "two":
            return [torch.optim.SGD(self.embed.parameters(), 0.1), torch.optim.SGD(self.head.parameters(), 0.1)]
        if self.what == "adafactor":
            return torch.optim.Adafactor(self.parameters(), lr=0.1)
        return RowNormed(self.parameters(), {"lr": 0.1})


class RowNormed(torch.optim.Optimizer):
    """Divides by the norm of each row, as LARS, LAMB and Muon do by larger parts."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                size = parameter.grad.norm(dim=-1, keepdim=True).clamp_min(1e-6)
                parameter.sub_(group["lr"] * parameter.grad / size)


class SignSGD(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * parameter.grad.sign())


def refused(rank: int, make: Any) -> str:
    run = SplitRun()
    with pytest.raises(UlyssesError) as caught:
        split_trainer(run).fit(make(), split_loader(PAIRS, run, rank))
    return str(caught.value)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (ClipsByValue, "clip_gradients(gradient_clip_algorithm='value')"),
        (partial(Stepping, "none"), "0 optimizers"),
        (partial(Stepping, "two"), "2 optimizers"),
        (partial(Stepping, "adafactor"), "Adafactor, whose step on a flat piece"),
        (partial(Stepping, "rows"), "RowNormed, whose step on a flat piece"),
    ],
)
def test_what_zero_cannot_do_is_refused_by_name(pool: ProcessPool, make: Any, part: str) -> None:
    for text in pool.run(refused, make, world_size=2):
        assert part in text


CPU = torch.device("cpu")


def test_elementwise_optimizers_pass() -> None:
    parameters = [torch.nn.Parameter(torch.randn(4, 3))]
    for optimizer in (
        SignSGD(parameters, {"lr": 0.1}),
        torch.optim.Rprop(parameters),
        torch.optim.AdamW(parameters, fused=True),
    ):
        check_elementwise(optimizer, CPU)
    kinds = [torch.optim.SGD, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adagrad]
    if torch.optim.Adagrad(parameters).state:
        # Of torch before 2.13: its state exists at once, and DeepSpeed makes it anew.
        kinds.pop()
    # The known ones are: tried, they pass as well.
    for kind in kinds:
        check_elementwise(type("Mine", (kind,), {})(parameters, lr=0.1), CPU)  # type: ignore[operator]


class ScheduleFree(SignSGD):
    """Steps only in its training mode, into which nobody puts the copy that ZeRO steps."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if not self.param_groups[0].get("train_mode", False):
            raise RuntimeError("Optimizer was not in train mode when step is called.")
        super().step()


def test_optimizers_that_fail_on_flat_pieces_are_refused() -> None:
    parameters = [torch.nn.Parameter(torch.randn(4, 3))]
    for optimizer, reason in (
        (torch.optim.LBFGS(parameters), "closure"),
        (torch.optim.Muon(parameters), "2D matrix"),
        (ScheduleFree(parameters, {"lr": 0.1}), "train mode"),
    ):
        with pytest.raises(UlyssesError, match=f"{type(optimizer).__name__}, which fails at a step .*{reason}"):
            check_elementwise(optimizer, CPU)


class OneParameter(SignSGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert len(self.param_groups[0]["params"]) == 1
        super().step()


def test_an_optimizer_that_cannot_be_tried_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="OneParameter could not be tried"):
        check_elementwise(OneParameter([torch.nn.Parameter(torch.randn(3))], {"lr": 0.1}), CPU)
