"""Activation checkpointing: attention is called again in the backward, and has to exchange there as well."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from exact import BOUND, fit_broken
from models import HandWritten, LlamaModule, count_targets, pair_batch, token_batch
from nightly import mostly
from torch import Tensor

from lightning_ulysses import UlyssesError, sequence_positions
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.testing import SplitRun, compare, fit_rank, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool
from lightning_ulysses.upstream import deepspeed as upstream_deepspeed

TOKENS = [token_batch(seed, 33, 2, "uneven") for seed in range(2)]
PAIRS = [pair_batch(seed, 33, 2, "uneven") for seed in range(2)]
ACCUMULATE: dict[str, Any] = {"accumulate_grad_batches": 2}


class Checkpointed(LlamaModule):
    """transformers' own switch."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})


class ByHand(HandWritten):
    """Blocks under a checkpoint of torch or DeepSpeed, with a residual around it and a tensor that all blocks get."""

    def __init__(self, kind: str) -> None:
        super().__init__(kv_heads=2)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        place = self.place(sequence_positions(x))
        for block in self.blocks:

            def run(h: Tensor, place: Tensor, block: Any = block) -> Tensor:
                return block(h + place)

            h = h + self.checkpointed(run, h, place)
        return self.head(h)

    def checkpointed(self, run: Any, *args: Tensor) -> Tensor:
        if self.kind == "deepspeed" and self._trainer is not None:
            import deepspeed

            out: Tensor = deepspeed.checkpointing.checkpoint(run, *args)
            return out
        if self.kind == "deepspeed":
            return run(*args)
        out = torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=self.kind == "reentrant")
        return out


@pytest.mark.parametrize("stage", mostly([2, 3], [2]))
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_transformers(pool: ProcessPool, stage: int, use_reentrant: bool) -> None:
    make = partial(Checkpointed, use_reentrant)
    reference = fit_single(LlamaModule, [TOKENS], count_targets)
    for result in fit_split(pool, make, TOKENS, SplitRun(2, 2, {"stage": stage}, ACCUMULATE)):
        assert compare(result, reference).largest <= BOUND


@pytest.mark.parametrize(
    ("kind", "stage"), [("reentrant", 2), ("reentrant", 3), ("not reentrant", 2), ("deepspeed", 2), ("deepspeed", 3)]
)
def test_by_hand(pool: ProcessPool, stage: int, kind: str) -> None:
    make = partial(ByHand, kind)
    reference = fit_single(make, [PAIRS], count_targets)
    for result in fit_split(pool, make, PAIRS, SplitRun(2, 2, {"stage": stage}, ACCUMULATE)):
        assert compare(result, reference).largest <= BOUND


@pytest.mark.parametrize("stage", mostly([2, 3], [3]))
@pytest.mark.parametrize(
    "settings",
    [
        {"cpu_checkpointing": True},
        {"partition_activations": True},
        {"cpu_checkpointing": True, "partition_activations": True, "synchronize_checkpoint_boundary": True},
    ],
    ids=["cpu", "partition", "both"],
)
def test_settings_of_deepspeed(pool: ProcessPool, stage: int, settings: dict[str, Any]) -> None:
    make = partial(ByHand, "deepspeed")
    reference = fit_single(make, [PAIRS], count_targets)
    for result in fit_split(pool, make, PAIRS, SplitRun(2, 2, {"stage": stage, **settings}, ACCUMULATE)):
        assert compare(result, reference).largest <= BOUND


@pytest.mark.parametrize("setting", ["cpu_checkpointing", "partition_activations"])
def test_without_copies_of_the_inputs_it_is_wrong(pool: ProcessPool, setting: str) -> None:
    """DeepSpeed empties the tensors that a checkpointed function was given."""
    make = partial(ByHand, "deepspeed")
    reference = fit_single(make, [PAIRS[:1]], count_targets)
    run = SplitRun(strategy={setting: True, "check_model": False})
    assert compare(fit_split(pool, make, PAIRS[:1], run)[0], reference).largest <= BOUND
    target = "lightning_ulysses.interceptors.install_all.keep_checkpoint_inputs"
    for outcome in pool.run(fails_or_differs, make, PAIRS[:1], run, target, Handle, world_size=2):
        assert isinstance(outcome, str) or compare(outcome, reference).largest > 100 * BOUND


def fails_or_differs(rank: int, make: Any, batches: Any, run: SplitRun, target: str, replacement: Any) -> Any:
    try:
        return fit_broken(rank, make, batches, run, target, replacement)
    except (RuntimeError, ValueError) as error:
        return str(error)


def dead_in_backward(rank: int, make: Any, batches: Any, run: SplitRun) -> Any:
    from lightning_ulysses.context import SequenceContext
    from lightning_ulysses.strategy import UlyssesDeepSpeedStrategy

    backward = UlyssesDeepSpeedStrategy.backward

    def dead(context: SequenceContext, batch: Any) -> Any:
        return context.suspended()

    def hidden(self: Any, *args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(SequenceContext, "backward", dead):
            return backward(self, *args, **kwargs)

    with mock.patch.object(UlyssesDeepSpeedStrategy, "backward", hidden):
        return fit_rank(rank, make, batches, run)


@pytest.mark.parametrize("kind", ["reentrant", "deepspeed"])
def test_without_the_exchange_in_the_backward_it_is_wrong(pool: ProcessPool, kind: str) -> None:
    make = partial(ByHand, kind)
    reference = fit_single(make, [PAIRS[:1]], count_targets)
    for result in pool.run(dead_in_backward, make, PAIRS[:1], SplitRun(), world_size=2):
        assert compare(result, reference).step > 100 * BOUND


def refusal(rank: int, settings: dict[str, Any], model_parallel: int) -> str:
    from deepspeed.runtime.activation_checkpointing import checkpointing

    run = SplitRun(strategy=settings)
    with mock.patch.object(checkpointing, "mp_size", model_parallel), pytest.raises(UlyssesError) as caught:
        fit_rank(rank, partial(ByHand, "deepspeed"), PAIRS, run)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "model_parallel", "name"),
    [
        ({"partition_activations": True, "contiguous_memory_optimization": True}, 1, "contiguous_memory_optimization"),
        ({"partition_activations": True}, 2, "partition_activations over 2 model-parallel ranks"),
    ],
)
def test_refused_by_name(pool: ProcessPool, settings: dict[str, Any], model_parallel: int, name: str) -> None:
    for text in pool.run(refusal, settings, model_parallel, world_size=2):
        assert name in text


def test_the_patch_is_undone() -> None:
    from deepspeed.runtime.activation_checkpointing import checkpointing

    names = [name for name in vars(checkpointing) if name.endswith("_activations_for_backward")]
    before = {name: getattr(checkpointing, name) for name in names}
    handle = upstream_deepspeed.keep_checkpoint_inputs()
    assert len(names) == 3 and all(getattr(checkpointing, name) is not before[name] for name in names)
    handle.remove()
    assert all(getattr(checkpointing, name) is before[name] for name in names)
