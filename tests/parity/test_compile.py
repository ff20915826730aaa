"""``torch.compile`` of a model, of a part of it, in place, and of the LightningModule as a whole."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from compiled import OPERATORS, PAIRS, CompiledByHand, named_as, watched
from exact import BOUND, fit_broken
from mixing import PAIRS as MIXED
from mixing import Between, Conv, refused
from models import HandWritten, LlamaModule, count_targets, token_batch
from nightly import mostly
from planned import LitModule

from lightning_ulysses.testing import (
    SplitRun,
    StepRecorder,
    StepResult,
    compare,
    fit_single,
    fit_split,
    split_loader,
    split_trainer,
)
from lightning_ulysses.testing.processes import ProcessPool

TOKENS = [token_batch(seed, 32 + seed % 2, 2, "uneven") for seed in range(2)]


def fit_compiled(rank: int, make: Any, batches: list[Any], run: SplitRun) -> tuple[StepResult, list[str]]:
    """What `fit_rank` does, and the operators of the compiled graphs."""
    OPERATORS.clear()
    recorder = StepRecorder()
    trainer = split_trainer(run, [recorder])
    trainer.fit(make(), split_loader(batches, run, rank))
    # Lightning knows again which steps are compiled; meanwhile it may not.
    compiled = hasattr(vars(trainer.lightning_module).get("training_step"), "_torchdynamo_orig_callable")
    assert compiled == (trainer.lightning_module._compiler_ctx is not None)
    return recorder.result(), list(OPERATORS)


class CompiledLlama(LlamaModule):
    """A transformers model compiled in one of the usual ways."""

    def __init__(self, how: str, backend: Any = watched, **kwargs: Any) -> None:
        super().__init__(layers=1, lr=0.2, **kwargs)
        if how == "wrapped":
            self.model = torch.compile(self.model, backend=backend)


class CompiledBlocks(LitModule):
    """What a plan splits, compiled block by block."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for block in self.gpt.transformer.h:
            block.compile(backend=watched)


def whole(make: Any) -> Any:
    """``module = torch.compile(module)``."""
    return torch.compile(make(), backend=watched)


def itself(make: Any) -> Any:
    """``module.compile()``."""
    module = make()
    module.compile(backend=watched)
    return module


LLAMA, HAND = partial(LlamaModule, layers=1, lr=0.2), partial(HandWritten, lr=0.2)
ZERO_3, PLANNED = SplitRun(strategy={"stage": 3}), SplitRun(strategy={"plan": "litgpt"})
CASES: dict[str, tuple[Any, Any, list[Any], SplitRun]] = {
    "whole": (partial(whole, HAND), HAND, PAIRS, SplitRun()),
    "whole, of transformers": (partial(whole, LLAMA), LLAMA, TOKENS, SplitRun()),
    "itself": (partial(itself, HAND), HAND, PAIRS, SplitRun()),
    "blocks, checkpointed": (partial(CompiledByHand, "blocks", checkpointing=True), HAND, PAIRS[:1], SplitRun()),
    "whole, with a plan": (partial(whole, LitModule), LitModule, TOKENS, PLANNED),
    "blocks, checkpointed, with a plan": (
        partial(CompiledBlocks, checkpoints="block"),
        partial(LitModule, checkpoints="block"),
        TOKENS,
        PLANNED,
    ),
    "blocks, zero 3": (partial(CompiledByHand, "blocks"), HAND, PAIRS[:1], ZERO_3),
}


def collectives(operators: list[str]) -> list[str]:
    return [name for name in operators if "all_to_all" in name or "c10d" in name]


@pytest.mark.parametrize("case", mostly(CASES, [case for case in CASES if case not in ("whole", "whole, with a plan")]))
def test_two_steps(pool: ProcessPool, case: str) -> None:
    make, plain, batches, run = CASES[case]
    reference = fit_single(plain, [[batch] for batch in batches], count_targets)
    for result, operators in pool.run(fit_compiled, make, batches, run, world_size=2):
        assert compare(named_as(result, reference), reference).largest <= BOUND
        # It did compile, and no collective is in what was compiled.
        assert sum("mm" in name for name in operators) >= 10
        assert collectives(operators) == []


def fit_inside(rank: int, make: Any, batches: list[Any], run: SplitRun) -> tuple[StepResult | None, list[str]]:
    """`fit_compiled` with nothing kept out of the graphs."""
    with mock.patch("lightning_ulysses.context.eager", lambda function: function):
        try:
            return fit_compiled(rank, make, batches, run)
        except RuntimeError:
            return None, list(OPERATORS)


def test_collectives_would_be_in_the_graphs(pool: ProcessPool) -> None:
    make = partial(CompiledByHand, "blocks")
    for _, operators in pool.run(fit_inside, make, PAIRS[:1], SplitRun(), world_size=2):
        assert collectives(operators)


def no_weight(count: float, total: float, world_size: int) -> float:
    return 1.0


def test_the_comparison_can_fail(pool: ProcessPool) -> None:
    make = partial(CompiledByHand, "blocks")
    reference = fit_single(HAND, [PAIRS[:1]], count_targets)
    target = "lightning_ulysses.loss.weights.token_weight"
    for result in pool.run(fit_broken, make, PAIRS[:1], SplitRun(), target, no_weight, world_size=2):
        assert compare(result, reference).largest > 100 * BOUND


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler on CPU")
def test_inductor(pool: ProcessPool) -> None:
    make = partial(CompiledByHand, "first block", backend="inductor")
    reference = fit_single(HAND, [PAIRS[:1]], count_targets)
    for result in fit_split(pool, make, PAIRS[:1], SplitRun()):
        assert compare(result, reference).largest <= BOUND


class CompiledBetween(Between):
    """A convolution inside of something compiled."""

    def __init__(self, how: str) -> None:
        super().__init__(Conv)
        if how == "wrapped":
            self.between = torch.compile(self.between, backend=watched)
        elif how == "in place":
            self.between.compile(backend=watched)


MENDED = {
    "wrapped": partial(CompiledBetween, "wrapped"),
    "in place": partial(CompiledBetween, "in place"),
    "whole": partial(whole, partial(Between, Conv)),
    "itself": partial(itself, partial(Between, Conv)),
}


@pytest.mark.parametrize("how", mostly(MENDED, ["in place", "whole"]))
def test_compiled_convolutions_get_a_halo(pool: ProcessPool, how: str) -> None:
    make = MENDED[how]
    reference = fit_single(partial(Between, Conv), [[batch] for batch in MIXED], count_targets)
    for result, _ in pool.run(fit_compiled, make, MIXED, SplitRun(strategy={"split": "batch"}), world_size=2):
        assert compare(named_as(result, reference), reference).largest <= BOUND


class Adding(HandWritten):
    """Adds up tokens between its submodules."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x).cumsum(1)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


@pytest.mark.parametrize("how", ["whole", "itself"])
def test_the_check_sees_compiled_models(pool: ProcessPool, how: str) -> None:
    make = partial({"whole": whole, "itself": itself}[how], Adding)
    for error in pool.run(refused, make, SplitRun(strategy={"split": "batch"}), world_size=2):
        assert "'blocks.0.norm1' (LayerNorm)" in str(error)


def test_wrappers_under_zero_3_are_refused(pool: ProcessPool) -> None:
    for error in pool.run(refused, partial(CompiledLlama, "wrapped"), ZERO_3, world_size=2):
        assert "self.model = torch.compile" in str(error) and "self.model.compile()" in str(error)


def before_and_after(rank: int, batches: list[Any]) -> tuple[StepResult, list[str], bool]:
    """A model that has run before the strategy exists, and runs again after it is gone."""
    module = CompiledLlama("wrapped")
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    wanted = float(module.training_step(batches[0], 0).detach())
    result, operators = fit_compiled(rank, lambda: module, batches, SplitRun())
    module.load_state_dict(weights)
    return result, operators, abs(float(module.training_step(batches[0], 0).detach()) - wanted) < 1e-6


def test_what_was_compiled_before_is_compiled_again(pool: ProcessPool) -> None:
    reference = fit_single(LLAMA, [TOKENS[:1]], count_targets)
    for result, operators, same in pool.run(before_and_after, TOKENS[:1], world_size=2):
        assert compare(named_as(result, reference), reference).largest <= BOUND
        assert same and collectives(operators) == [] and len(operators) > 20
