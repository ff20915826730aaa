"""The core in a loop written by hand, without Trainer, strategy and DeepSpeed: a step on several ranks against one."""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from exact import BOUND, no_weight
from fresh import in_fresh_python
from models import count_targets, hand_written, llama, pair_batch, token_batch

from lightning_ulysses import UlyssesError
from lightning_ulysses.batch.clock import Clock
from lightning_ulysses.config import UlyssesConfig
from lightning_ulysses.exchange.mesh import MeshSizes, SequenceMesh
from lightning_ulysses.sequence_parallel import SequenceParallel
from lightning_ulysses.testing import StepResult, compare, fit_single
from lightning_ulysses.testing.processes import ProcessPool


class Run(NamedTuple):
    """``world`` is the number of processes and P."""

    world: tuple[int, int] = (2, 2)
    accumulate: int = 1


def average(module: torch.nn.Module) -> None:
    """What ZeRO does with gradients: the mean over all processes of the world."""
    for parameter in module.parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(gradient)
        parameter.grad = gradient / dist.get_world_size()


def train(rank: int, make: Any, batches: list[Any], run: Run) -> StepResult:
    world, sp_size = run.world
    dist.init_process_group("gloo", rank=rank, world_size=world)
    mesh = SequenceMesh.create(MeshSizes(sp_size, world // sp_size), "cpu")
    module = make().train()
    optimizer: Any = module.configure_optimizers()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    mine = batches[mesh.dp_rank :: mesh.dp_size]
    core = SequenceParallel(UlyssesConfig(sp_size=sp_size), mesh, torch.device("cpu"), seed=0)
    loader = core.loader(mine, lambda: Clock(accumulate=run.accumulate), lambda: len(mine), lambda batch: batch)
    losses, norms = [], []
    with core.installed(module):
        for index, batch in enumerate(loader):
            last = (index + 1) % run.accumulate == 0 or index + 1 == len(mine)
            clock = Clock(batch=index, step=len(losses), accumulate=run.accumulate, is_boundary=last)
            inputs = core.receive(batch, clock)
            with core.step(clock, "training_step"):
                loss = module.training_step(inputs, index)
            with core.backward():
                core.weigh(loss).backward()
            if last:
                average(module)
                norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), float("inf"))))
                optimizer.step()
                optimizer.zero_grad()
                core.stepped()
                losses.append(float(core.weights.global_loss()))
    after = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    return StepResult(tuple(losses), tuple(norms), before, after)


CASES: dict[str, tuple[Any, list[Any], Run]] = {
    "uneven labels": (llama(), [token_batch(1, 33, 2, "uneven")], Run()),
    "a slice without a label": (llama(), [token_batch(1, 32, 1, "first_half")], Run()),
    "odd heads": (llama(heads=9, kv_heads=3), [token_batch(1, 33, 1)], Run((2, 2))),
    "three ranks": (hand_written(heads=5, kv_heads=5), [pair_batch(1, 32, 2, "uneven")], Run((3, 3))),
    "accumulation": (llama(), [token_batch(n, 33, 1, "uneven") for n in range(3)], Run(accumulate=3)),
    "an incomplete last window": (llama(), [token_batch(n, 33, 1, "uneven") for n in range(3)], Run(accumulate=2)),
    "two groups": (llama(), [token_batch(n, 33, 1, "uneven") for n in range(2)], Run((4, 2))),
    "not split": (hand_written(), [pair_batch(1, 33, 2, "uneven")], Run((1, 1))),
}


def steps_of(batches: list[Any], run: Run) -> list[list[Any]]:
    size = run.accumulate * (run.world[0] // run.world[1])
    return [batches[begin : begin + size] for begin in range(0, len(batches), size)]


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_one_process(pool: ProcessPool, case: str) -> None:
    make, batches, run = CASES[case]
    wanted = fit_single(make, steps_of(batches, run), count_targets)
    for result in pool.run(train, make, batches, run, world_size=run.world[0]):
        assert compare(result, wanted).largest <= BOUND, compare(result, wanted)


def train_without_weights(rank: int, make: Any, batches: list[Any], run: Run) -> StepResult:
    with mock.patch("lightning_ulysses.loss.weights.token_weight", no_weight):
        return train(rank, make, batches, run)


def test_without_the_weights_it_is_wrong(pool: ProcessPool) -> None:
    make, batches, run = CASES["uneven labels"]
    wanted = fit_single(make, steps_of(batches, run), count_targets)
    for result in pool.run(train_without_weights, make, batches, run, world_size=2):
        assert compare(result, wanted).largest > 100 * BOUND


def refusals(rank: int, make: Any, batches: list[Any]) -> list[str]:
    """What the core says of two backward passes in a step, and of a step without attention."""
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = SequenceMesh.create(MeshSizes(2, 1), "cpu")
    found = []
    module = make()
    core = SequenceParallel(UlyssesConfig(sp_size=2), mesh, torch.device("cpu"), seed=0)
    with core.installed(module):
        for is_automatic in (True, False):
            clock = Clock(is_automatic=is_automatic)
            inputs = core.receive(batches[0], clock)
            with core.step(clock, "training_step"):
                loss = module.training_step(inputs, 0)
            with core.backward():
                core.weigh(loss).backward()
            with pytest.raises(UlyssesError) as caught:
                core.weigh(loss)
            found.append(str(caught.value))
            core.stepped()
    core = SequenceParallel(UlyssesConfig(sp_size=2), mesh, torch.device("cpu"), seed=0)
    with core.installed(module):
        core.receive(batches[0], Clock())
        with pytest.raises(UlyssesError) as caught, core.step(Clock(), "training_step"):
            pass
        found.append(str(caught.value))
    return found


def test_what_the_core_refuses(pool: ProcessPool) -> None:
    for automatic, manual, nothing in pool.run(refusals, llama(), [token_batch(1, 33)], world_size=2):
        for text in (automatic, manual):
            assert "2 backward passes without an optimizer step" in text and "add the losses before backward" in text
            assert ("automatic optimization" in text) == (text is manual)
        assert "without a single attention call intercepted" in nothing


ALONE = """
import json, sys
import torch
from torch import nn
from lightning_ulysses.batch.clock import Clock
from lightning_ulysses.config import UlyssesConfig
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.sequence_parallel import SequenceParallel

module = nn.Linear(4, 4)
core = SequenceParallel(UlyssesConfig(sp_size=1), SequenceMesh(0, 1, 1, 0, 1, 0), torch.device("cpu"), seed=0)
x, y = torch.randint(0, 4, (2, 8)), torch.randint(0, 4, (2, 8))
with core.installed(module):
    (inputs, targets) = core.receive((x, y), Clock())
    with core.step(Clock(), "training_step"):
        logits = module(nn.functional.one_hot(inputs, 4).float())
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
print(json.dumps([float(loss), "deepspeed" in sys.modules]))
"""


@pytest.mark.processes
def test_the_core_imports_no_deepspeed() -> None:
    loss, has_deepspeed = in_fresh_python(ALONE)
    assert loss > 0 and not has_deepspeed
