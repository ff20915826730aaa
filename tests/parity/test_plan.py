"""A plan splits a model inside: one optimizer step is the step of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact import BOUND, fit_broken
from models import count_targets, pair_batch, token_batch
from nightly import mostly
from planned import count_samples, denoiser, image_batch, lit, text_batches

from lightning_ulysses.exchange import cut_and_join as cutting
from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool

UNJOINED = {"plan": "litgpt_unjoined"}
JOINED = {"plan": "litgpt"}
TOKENS = token_batch(7, 34, 2)["input_ids"]


def shifted(batch: Any) -> Any:
    return {**batch, "shift_labels": F.pad(batch["labels"][:, 1:], (0, 1), value=-100)}


DP = {"accumulate_grad_batches": 2}
TEXT: dict[str, tuple[Any, list[Any], SplitRun]] = {
    "joined, some without targets": (
        lit(),
        [*text_batches(1, "none"), *text_batches(2)],
        SplitRun(2, 2, JOINED, {"accumulate_grad_batches": 3}),
    ),
    "joined, dp x sp, zero 3": (lit(), text_batches(4), SplitRun(4, 2, {**JOINED, "stage": 3}, DP)),
    "joined, three ranks": (lit(heads=3, groups=1, width=24), text_batches(1), SplitRun(3, 3, JOINED)),
    "joined, pairs": (lit(), [pair_batch(1, 33, 2, "uneven")], SplitRun(strategy=JOINED)),
    "joined, tokens alone": (lit(), [TOKENS], SplitRun(strategy=JOINED)),
    "joined, shift_labels, zero 3": (lit(loss="given"), text_batches(1), SplitRun(strategy={**JOINED, "stage": 3})),
    "two calls of two lengths": (lit(calls=2), text_batches(2), SplitRun(4, 2, JOINED)),
    "unjoined, dp x sp, zero 3": (lit(loss="given"), text_batches(4), SplitRun(4, 2, {**UNJOINED, "stage": 3}, DP)),
    "unjoined, pairs, unlabelled slice": (lit(), [pair_batch(1, 33, 2, "first_half")], SplitRun(strategy=UNJOINED)),
    "by hand": (
        lit(),
        text_batches(1),
        SplitRun(strategy={"plan": {"split": {"h.*": {0: 1, "cos": 1, "sin": -2}}, "join": {"ln_f": 1}}}),
    ),
    "checkpointed blocks": (lit(checkpoints="block"), text_batches(1), SplitRun(strategy=JOINED)),
    "checkpointed, reentrant": (lit(checkpoints="reentrant"), text_batches(1), SplitRun(strategy=JOINED)),
    "checkpointed by DeepSpeed": (
        lit(checkpoints="deepspeed"),
        text_batches(1),
        SplitRun(strategy={**JOINED, "partition_activations": True}),
    ),
    "checkpointed, zero 3": (lit(checkpoints="attention"), text_batches(1), SplitRun(strategy={**JOINED, "stage": 3})),
    "checkpointed, unjoined": (
        lit(checkpoints="attention", loss="given"),
        text_batches(1),
        SplitRun(strategy=UNJOINED),
    ),
    "one process, where a plan does nothing": (
        lit(),
        text_batches(1),
        SplitRun(1, 1, {"plan": {"split": {"no": {"x": 1}}, "join": {"no": 1}}}),
    ),
}


def count_tokens(batch: Any) -> float:
    return float(batch[:, 1:].numel()) if isinstance(batch, torch.Tensor) else count_targets(batch)


# Settings that others have, or one of them alone.
SELDOM = (
    "joined, three ranks",
    "joined, tokens alone",
    "unjoined, dp x sp, zero 3",
    "checkpointed, reentrant",
    "checkpointed, zero 3",
    "checkpointed, unjoined",
)


@pytest.mark.parametrize("case", mostly(TEXT, SELDOM))
def test_text(pool: ProcessPool, case: str) -> None:
    make, batches, run = TEXT[case]
    wanted = [shifted(batch) if isinstance(batch, dict) else batch for batch in batches]
    reference = fit_single(make, [wanted], count_tokens)
    assert reference.step().norm() > 1e-3
    for result in fit_split(pool, make, batches, run):
        assert compare(result, reference).largest <= BOUND, compare(result, reference)


DIFFUSERS = {"plan": "diffusers"}
# Without `local`, attention to keys that are no part of the sequence is told by their number.
NOT_LOCAL = {"split": {"blocks.*": {"hidden_states": 1, "rotary_emb": 1}}, "join": {"proj_out": 1}}
IMAGES: dict[str, tuple[Any, list[Any], SplitRun]] = {
    "dp x sp, zero 3, rows of one to three": (
        denoiser(),
        [image_batch(1), image_batch(2, 1), image_batch(3, 3), image_batch(4)],
        SplitRun(4, 2, {**DIFFUSERS, "stage": 3}, DP),
    ),
    "as much text as slice, on four": (denoiser(), [image_batch(1, 2, 8, 16, 8)], SplitRun(4, 4, DIFFUSERS)),
    "as much text as image": (denoiser(), [image_batch(1, 2, 8, 16, 32)], SplitRun(strategy=DIFFUSERS)),
    "as much text as one slice": (denoiser(), [image_batch(1, 2, 6, 22, 17)], SplitRun(strategy=DIFFUSERS)),
    "text that no pattern names": (denoiser(), [image_batch(1)], SplitRun(strategy={"plan": NOT_LOCAL})),
}


@pytest.mark.parametrize("case", mostly(IMAGES, ["as much text as one slice", "as much text as slice, on four"]))
def test_images(pool: ProcessPool, case: str) -> None:
    make, batches, run = IMAGES[case]
    reference = fit_single(make, [batches], count_samples)
    assert reference.step().norm() > 1e-3
    for result in fit_split(pool, make, batches, run):
        assert compare(result, reference).largest <= BOUND, compare(result, reference)


def own_slice(whole: torch.Tensor, dim: int, shares: Any, rank: int, group: Any) -> torch.Tensor:
    """A join's backward that forgets what the other ranks' losses ask of this slice."""
    start = sum(shares[:rank])
    return whole.narrow(dim, start, shares[rank])


def first_slice(tensor: torch.Tensor, dim: int, layout: Any, rank: int) -> torch.Tensor:
    """A cut that gives every rank the first positions."""
    is_table = not tensor.requires_grad
    return tensor.narrow(dim, 0, layout.shares[rank]) if is_table else cutting.cut(tensor, dim, layout, rank)


CONTROLS: dict[str, tuple[str, Any]] = {
    "join without the sum": ("lightning_ulysses.exchange.cut_and_join.sum_slices", own_slice),
    "positions not split": ("lightning_ulysses.regions.hooks.cut", first_slice),
}


@pytest.mark.parametrize("mechanism", CONTROLS)
def test_negative_control(pool: ProcessPool, mechanism: str) -> None:
    """Without the mechanism the comparison goes red."""
    target, replacement = CONTROLS[mechanism]
    reference = fit_single(lit(), [text_batches(1)], count_targets)
    run = SplitRun(strategy={**JOINED, "check_model": False})
    for result in pool.run(fit_broken, lit(), text_batches(1), run, target, replacement, world_size=2):
        assert compare(result, reference).largest > 100 * BOUND
