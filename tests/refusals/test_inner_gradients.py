"""Gradients that a step takes and reads itself: refused where they cross slices, exact where they do not."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact import BOUND, fit_broken, refused
from lightning import LightningModule
from recipe_batches import unpadded
from recipe_models import GPT
from recipes import one, valid
from torch import Tensor

from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool

TWO = SplitRun(trainer={"accumulate_grad_batches": 2})


class Perturbed(LightningModule):
    """Adversarial training: the step moves its embeddings along the gradient of its loss."""

    def __init__(self, along: str, places: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.along, self.places = GPT(), along, places

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        for block in self.model.blocks:
            hidden = block(hidden)
        return F.cross_entropy(self.model.head(self.model.norm(hidden)).flatten(0, 1), labels.flatten())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.model.embed(batch["input_ids"])
        if self.places:
            hidden = hidden + self.model.place(torch.arange(hidden.shape[1]))
        start = hidden.detach().requires_grad_()
        (found,) = torch.autograd.grad(self.loss(start, batch["labels"]), start)
        if self.along == "token":
            found = F.normalize(found, dim=-1) * 0.1
        elif self.along == "batch":
            found = 0.003 * found / found.norm()
        else:
            found = 0.01 * found.sign()
        return self.loss(hidden + found, batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Penalized(Perturbed):
    """The gradient of the head alone, of which every rank computes all."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.model(batch["input_ids"])
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        (found,) = torch.autograd.grad(loss, self.model.head.weight, create_graph=True)
        return loss + found.pow(2).sum()


BATCHES = [unpadded(seed) for seed in (1, 2)]
BATCHES[1]["labels"][:2, 10:30] = -100
REFUSED = "Got a gradient that is taken inside of the step"


@pytest.mark.parametrize(("along", "places"), [("token", False), ("sign", False), ("batch", True)])
def test_through_attention(pool: ProcessPool, along: str, places: bool) -> None:
    """Cut in the batch, and in the blocks where positions ask for that."""
    for text in pool.run(refused, partial(Perturbed, along, places), BATCHES, TWO, world_size=2):
        assert text.startswith(REFUSED), text


def test_through_what_a_plan_splits(pool: ProcessPool) -> None:
    """No attention is inside, so nothing but the join exchanges gradients."""
    plan = {"split": {"model.blocks.*.mlp": {"input": 1}}, "join": {"model.blocks.*.mlp": 1}}
    run = SplitRun(strategy={"plan": plan, "loss_weighting": "none"}, trainer=TWO.trainer)
    for text in pool.run(refused, partial(Perturbed, "token", True), BATCHES, run, world_size=2):
        assert text.startswith(REFUSED), text


def test_of_what_is_whole(pool: ProcessPool) -> None:
    make = partial(Penalized, "", True)
    wanted = fit_single(make, [BATCHES], one)
    for result in fit_split(pool, make, BATCHES, TWO):
        assert compare(result, wanted).largest <= BOUND


def nothing(context: Any) -> None:
    return None


@pytest.mark.parametrize(("along", "places", "count"), [("token", False, valid), ("batch", True, one)])
def test_they_are_wrong_on_slices(pool: ProcessPool, along: str, places: bool, count: Any) -> None:
    """Control: not refused, they make another step."""
    make = partial(Perturbed, along, places)
    wanted = fit_single(make, [BATCHES], count)
    mechanism = "lightning_ulysses.sequence_parallel.check_backward"
    for result in pool.run(fit_broken, make, BATCHES, TWO, mechanism, nothing, world_size=2):
        assert compare(result, wanted).largest > 1e-4
