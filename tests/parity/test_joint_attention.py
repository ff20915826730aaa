"""A text and an image that attend to each other: both are split, and each rank holds a slice of each."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from documents import BLOCKS
from exact import BOUND, fit_broken
from guests import count_rows
from nightly import mostly, sampled
from painters import PAINTERS, painter, painting
from torch import Tensor

from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool, RemoteError

FLUX, VIDEO = "FluxTransformer2DModel", "HunyuanVideoTransformer3DModel"
TWICE = {"accumulate_grad_batches": 2}
PLAN = yaml.safe_load(
    next(block.source for block in BLOCKS if block.name == "docs/splitting.md / A text beside an image / 1")
)["trainer"]["strategy"]["init_args"]["plan"]

_BLOCKS = ("transformer_blocks.*", "single_transformer_blocks.*")
VIDEO_PLAN = {
    "split": {
        "transformer_blocks.*": {"hidden_states": 1, "freqs_cis": 0},
        "single_transformer_blocks.*": {"hidden_states": 1, "image_rotary_emb": 0},
    },
    "cross": {name: {"encoder_hidden_states": 1} for name in _BLOCKS},
    "cross_first": False,
    "join": {name.replace("*", "1"): {"0": 1, "1": 1} for name in _BLOCKS},
}


def check(pool: ProcessPool, name: str, batches: list[Any], run: SplitRun) -> None:
    wanted = fit_single(painter(name), [batches], count_rows)
    assert wanted.step().norm() > 1e-3
    for result in fit_split(pool, painter(name), batches, run):
        assert compare(result, wanted).largest <= BOUND, compare(result, wanted)


# Its attention goes row by row, each with as many tokens of text as are no padding.
BY_ROWS = "MochiTransformer3DModel"


@pytest.mark.parametrize("name", sampled(["written", *(name for name in PAINTERS if name != BY_ROWS)], 3))
def test_found(pool: ProcessPool, name: str) -> None:
    check(pool, name, [painting(name, 1), painting(name, 2, 1)], SplitRun(trainer=TWICE))


@pytest.mark.nightly
def test_rows_that_attend_by_themselves_are_refused(pool: ProcessPool) -> None:
    with pytest.raises(RemoteError, match=r"attention over 1\d tokens while this rank holds"):
        fit_split(pool, painter(BY_ROWS), [painting(BY_ROWS, 1)], SplitRun())


FOUR, GROUPS = SplitRun(4, 4, {}, TWICE), SplitRun(4, 2, {"stage": 3})
CASES: dict[str, tuple[str, list[dict[str, Any]], SplitRun]] = {
    "four ranks, five heads": ("written", [{"text": 7}, {"text": 10}], FOUR),
    "two groups": ("written", [{"text": 7}, {"text": 10}], GROUPS),
    "more ranks than heads": (FLUX, [{"text": 9}, {"text": 12}], FOUR),
    "more ranks than heads, padding": (VIDEO, [{"text": 9}, {"text": 12}], FOUR),
    "as long as the image": ("written", [{"text": 33}, {"text": 32}], SplitRun(trainer=TWICE)),
    "longer than the image": ("written", [{"text": 40}, {"text": 35}], SplitRun(trainer=TWICE)),
    "as long as half the image": ("written", [{"text": 16}, {"text": 17}], SplitRun(trainer=TWICE)),
}


SELDOM = ("four ranks, five heads", "more ranks than heads", "as long as the image", "as long as half the image")


@pytest.mark.parametrize("case", mostly(CASES, SELDOM))
def test_lengths(pool: ProcessPool, case: str) -> None:
    name, texts, run = CASES[case]
    check(pool, name, [painting(name, seed, **text) for seed, text in enumerate(texts)], run)


def test_plan_by_hand(pool: ProcessPool) -> None:
    """That of the documents."""
    check(pool, FLUX, [painting(FLUX, 1), painting(FLUX, 2)], SplitRun(2, 2, {"plan": PLAN}, TWICE))


def first_tokens(value: Tensor, dim: int, layout: SequenceLayout, rank: int) -> Tensor:
    """A cut that gives every rank the first tokens of a text."""
    return value.narrow(dim, 0, layout.shares[rank])


def even(*parts: SequenceLayout) -> SequenceLayout:
    """Both as one sequence, cut evenly, as if its tokens were in their order after the exchange."""
    return SequenceLayout(sum(part.seq_len for part in parts), parts[0].sp_size)


CONTROLS: dict[str, tuple[str, Any, int]] = {
    "slices of the text": ("lightning_ulysses.regions.others._slice", first_tokens, 7),
    "order of the tokens": ("lightning_ulysses.context.SequenceLayout.of_both", even, 8),
}


@pytest.mark.parametrize("case", CONTROLS)
def test_controls(pool: ProcessPool, case: str) -> None:
    target, replacement, text = CONTROLS[case]
    name = VIDEO if case == "order of the tokens" else FLUX
    plan = VIDEO_PLAN if name == VIDEO else PLAN
    # More than one rank holds padding.
    batches = [painting(name, 1, text=text, padding=6 if name == VIDEO else 2)]
    run = SplitRun(2, 2, {"plan": plan, "check_model": False, "loss_weighting": "none"})
    wanted = fit_single(painter(name), [batches], count_rows)
    for result in fit_split(pool, painter(name), batches, run):
        assert compare(result, wanted).largest <= BOUND
    for result in pool.run(fit_broken, painter(name), batches, run, target, replacement, world_size=2):
        assert compare(result, wanted).largest > 10 * BOUND, compare(result, wanted)
