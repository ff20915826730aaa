"""Two sequences of their own lengths: both are split, and cross-attention exchanges heads of both."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
from exact import BOUND, fit_broken
from nightly import mostly
from pairs import TorchTranslator, WrittenTranslator, count_labels, pair_of_texts, speech, translator
from torch import Tensor

from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool

TWO = SplitRun(trainer={"accumulate_grad_batches": 2})
T5_PLAN = {
    "split": {"encoder.block.*": {"hidden_states": 1}, "decoder.block.*": {"hidden_states": 1}},
    "cross": {"decoder.block.*": {"encoder_hidden_states": 1}},
    "join": {"encoder.block.1": {"0": 1}, "decoder.block.1": {"0": 1}},
}


def exact(pool: ProcessPool, make: Any, batches: list[Any], run: SplitRun = TWO) -> None:
    wanted = fit_single(make, [batches], count_labels)
    assert wanted.step().norm() > 1e-3
    for result in fit_split(pool, make, batches, run):
        assert compare(result, wanted).largest <= BOUND, compare(result, wanted)


# The first batch decides how steps are split, and may have two sequences of one length.
LENGTHS = {"apart": ((29, 17), (33, 21)), "equal at first": ((29, 29), (33, 21)), "nearly equal": ((33, 32), (32, 33))}


MAKES: dict[str, Any] = {"T5": translator("T5"), "torch": TorchTranslator, "written": WrittenTranslator}
PAIRED = list(product(MAKES, LENGTHS))


# Each model with two kinds of lengths, and each kind of lengths with two models.
@pytest.mark.parametrize(("make", "lengths"), mostly(PAIRED, PAIRED[::4]))
def test_two_lengths(pool: ProcessPool, make: str, lengths: str) -> None:
    exact(pool, MAKES[make], [pair_of_texts(seed, *sizes) for seed, sizes in enumerate(LENGTHS[lengths], start=1)])


def test_four_processes(pool: ProcessPool) -> None:
    run = SplitRun(world_size=4, sp_size=4, trainer={"accumulate_grad_batches": 2})
    exact(pool, translator("T5"), [pair_of_texts(1, 38, 26), pair_of_texts(2, 27, 26)], run)


@pytest.mark.parametrize("stage", mostly([2, 3], [3]))
def test_groups(pool: ProcessPool, stage: int) -> None:
    run = SplitRun(world_size=4, sp_size=2, strategy={"stage": stage})
    exact(pool, translator("Bart"), [pair_of_texts(1, 29, 17), pair_of_texts(2, 33, 21, rows=3)], run)


def test_speech(pool: ProcessPool) -> None:
    exact(pool, translator("Whisper"), [speech(1, 17), speech(2, 33)])


def test_padding_of_the_decoder(pool: ProcessPool) -> None:
    """Both have 29 tokens and other ones that are padding."""
    batches = []
    for seed in (1, 2):
        batch = pair_of_texts(seed, 29, 29)
        mask = (batch["labels"] != -100).long()
        batches.append({**batch, "decoder_input_ids": batch["labels"].clamp_min(0), "decoder_attention_mask": mask})
    exact(pool, translator("Bart"), batches)


def test_frozen_encoder(pool: ProcessPool) -> None:
    make = partial(WrittenTranslator, frozen=True)
    exact(pool, make, [pair_of_texts(1, 29, 17), pair_of_texts(2, 33, 21)])


def test_checkpointed_activations(pool: ProcessPool) -> None:
    exact(pool, translator("T5", checkpointing=True), [pair_of_texts(1, 29, 17), pair_of_texts(2, 33, 21)])


def test_plan_by_hand(pool: ProcessPool) -> None:
    run = SplitRun(strategy={"plan": T5_PLAN}, trainer={"accumulate_grad_batches": 2})
    exact(pool, translator("T5"), [pair_of_texts(1, 29, 17), pair_of_texts(2, 33, 21)], run)


GATHERED: dict[str, tuple[Any, int, Any]] = {
    "1 head on 2": (partial(WrittenTranslator, heads=1), 2, 2),
    "3 heads on 4": (partial(WrittenTranslator, heads=3), 4, 4),
    "T5, 4 heads on 1 x 2": (translator("T5"), 2, {"ulysses": 1, "gather": 2}),
    "Bart, 4 heads on 1 x 2": (translator("Bart"), 2, {"ulysses": 1, "gather": 2}),
    "T5, 4 heads on 2 x 2": (translator("T5"), 4, {"ulysses": 2, "gather": 2}),
    "torch, 4 heads on 2 x 2": (TorchTranslator, 4, {"ulysses": 2, "gather": 2}),
}


@pytest.mark.parametrize("case", mostly(GATHERED, ["3 heads on 4", "Bart, 4 heads on 1 x 2"]))
def test_more_ranks_than_heads(pool: ProcessPool, case: str) -> None:
    """Queries of the decoder see all keys of the encoder, which ranks gather."""
    make, ranks, sizes = GATHERED[case]
    run = SplitRun(ranks, ranks, {"sp_size": sizes}, {"accumulate_grad_batches": 2})
    exact(pool, make, [pair_of_texts(1, 29, 17), pair_of_texts(2, 33, 33)], run)


def no_bias(batch: Any, position_bias: Any, mask: Tensor | None, *, is_split: bool) -> Tensor | None:
    return mask


def no_padding(mask: Any) -> None:
    return None


@pytest.mark.parametrize(
    ("mechanism", "replacement"),
    [
        ("lightning_ulysses.interceptors.transformers.attention.with_position_bias", no_bias),
        ("lightning_ulysses.interceptors.transformers.masks.valid_runs", no_padding),
    ],
)
def test_controls(pool: ProcessPool, mechanism: str, replacement: Any) -> None:
    batches = [pair_of_texts(1, 29, 17), pair_of_texts(2, 33, 21)]
    strategy = {"plan": T5_PLAN, "check_model": False, "targets": "labels"}
    run = SplitRun(strategy=strategy, trainer={"accumulate_grad_batches": 2})
    wanted = fit_single(translator("T5"), [batches], count_labels)
    for result in fit_split(pool, translator("T5"), batches, run):
        assert compare(result, wanted).largest <= BOUND
    for result in pool.run(fit_broken, translator("T5"), batches, run, mechanism, replacement, world_size=2):
        assert compare(result, wanted).largest > 1e-3
