"""Images with text: the tower and the merging see the whole batch, the blocks of the language model are split."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from exact import BOUND, fit_broken
from models import count_targets
from nightly import sampled
from sights import FAMILIES, Seeing, picture_text, seeing
from torch import Tensor

from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool

TWO = SplitRun(trainer={"accumulate_grad_batches": 2})


def exact(pool: ProcessPool, family: str, batches: list[Any], run: SplitRun = TWO) -> None:
    wanted = fit_single(seeing(family), [batches], count_targets)
    assert wanted.step().norm() > 1e-3
    for result in fit_split(pool, seeing(family), batches, run):
        assert compare(result, wanted).largest <= BOUND, compare(result, wanted)


@pytest.mark.parametrize("family", sampled(FAMILIES, 20, ["Gemma3"]))
def test_text_alone(pool: ProcessPool, family: str) -> None:
    exact(pool, family, [picture_text(family, seed, images=False) for seed in (1, 2)])


@pytest.mark.parametrize("family", sampled(FAMILIES, 20, ["Mistral3", "Qwen3VL"]))
def test_text_after_images(pool: ProcessPool, family: str) -> None:
    batches = [picture_text(family, 1, seq_len=38, padded=False), picture_text(family, 2, images=False)]
    exact(pool, family, batches)


@pytest.mark.parametrize("family", sampled(FAMILIES, 40))
def test_four_processes(pool: ProcessPool, family: str) -> None:
    run = SplitRun(world_size=4, sp_size=4, trainer={"accumulate_grad_batches": 2})
    exact(pool, family, [picture_text(family, seed) for seed in (1, 2)], run)


def test_groups_at_stage_3(pool: ProcessPool) -> None:
    run = SplitRun(world_size=4, sp_size=2, strategy={"stage": 3})
    exact(pool, "Qwen2_5_VL", [picture_text("Qwen2_5_VL", seed) for seed in (1, 2)], run)


class Penalized(Seeing):
    """With a term of all tokens, so that no number of targets is the weight of its loss."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        out = self.model(**batch)
        loss: Tensor = out.loss + 0.3 * out.logits.float().logsumexp(-1).square().mean()
        return loss


def penalized(rows: int) -> tuple[Any, list[Any]]:
    batches = [picture_text("Gemma3", seed, rows=rows) for seed in (1, 2)]
    # (B, S): the micro-batches have other numbers of targets, but as many tokens.
    batches[1]["labels"][0, 12:30] = -100
    return partial(Penalized, "Gemma3"), batches


@pytest.mark.parametrize("rows", [1, 2])
def test_a_term_of_all_tokens(pool: ProcessPool, rows: int) -> None:
    """Micro-batches have equal weights, as in one process."""
    build, batches = penalized(rows)
    wanted = fit_single(build, [batches], lambda _: 1)
    assert compare(fit_single(build, [batches], count_targets), wanted).largest > 1e-2
    for result in fit_split(pool, build, batches, TWO):
        assert compare(result, wanted).largest <= BOUND, compare(result, wanted)


def test_a_term_of_all_tokens_is_looked_for(pool: ProcessPool) -> None:
    """Control: the weights of the targets fit as well."""
    build, batches = penalized(1)
    wanted = fit_single(build, [batches], lambda _: 1)
    mechanism = "lightning_ulysses.checks.trial.row_weights._has_others"
    for result in pool.run(fit_broken, build, batches, TWO, mechanism, nothing, world_size=2):
        assert compare(result, wanted).largest > 1e-2


def nothing(*args: Any, **kwargs: Any) -> None:
    return None


def test_weights_need_a_trial_of_the_targets(pool: ProcessPool) -> None:
    """Control: rows of these images cannot be run alone."""
    batches = [picture_text("Qwen2_5_VL", seed) for seed in (1, 2)]
    wanted = fit_single(seeing("Qwen2_5_VL"), [batches], count_targets)
    mechanism = "lightning_ulysses.checks.trial.trial.names_of_targets"
    for result in pool.run(fit_broken, seeing("Qwen2_5_VL"), batches, TWO, mechanism, nothing, world_size=2):
        assert compare(result, wanted).largest > 1e-3
