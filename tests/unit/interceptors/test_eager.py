"""transformers' eager attention, taken over from models that have nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from models import VOCAB, count_targets, token_batch
from torch import Tensor
from zoo import Specimen

from lightning_ulysses import UlyssesError
from lightning_ulysses.attention.explicit import Extras
from lightning_ulysses.interceptors.transformers.eager import check_formula
from lightning_ulysses.testing import SplitRun, compare, fit_rank, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool

BATCHES = [token_batch(0, 33, 2, "uneven")]
NAMES = ("Gemma2ForCausalLM", "GptOssForCausalLM")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("run", [SplitRun(4, 4), SplitRun(strategy={"stage": 3})], ids=["4", "ZeRO-3"])
def test_one_step(pool: ProcessPool, name: str, run: SplitRun) -> None:
    make = partial(Specimen, name)
    reference = fit_single(make, [BATCHES], count_targets)
    for result in fit_split(pool, make, BATCHES, run):
        assert compare(result, reference).largest <= 1e-5


def fit_without_extras(rank: int, name: str) -> Any:
    """A split that forgets softcap or sinks, and whose check has been switched off."""
    import lightning_ulysses.interceptors.transformers.attention as huggingface

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface, "check_formula", lambda *args, **kwargs: None)
        patch.setattr(huggingface, "Extras", lambda *args: Extras())
        return fit_rank(rank, partial(Specimen, name), BATCHES, SplitRun())


@pytest.mark.parametrize("name", NAMES)
def test_the_features_matter(pool: ProcessPool, name: str) -> None:
    reference = fit_single(partial(Specimen, name), [BATCHES], count_targets)
    for result in pool.run(fit_without_extras, name, world_size=2):
        assert compare(result, reference).largest > 1e-4


@contextmanager
def another_formula() -> Iterator[None]:
    """A model whose own function divides by the number of keys in place of the sum."""
    from transformers.models.gemma2 import modeling_gemma2 as modeling

    def divided(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        k, v = (modeling.repeat_kv(t, module.num_key_value_groups) for t in (k, v))
        weights = (q @ k.transpose(2, 3) + mask).exp() / k.shape[2]
        return (weights @ v).transpose(1, 2).contiguous(), None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "eager_attention_forward", divided)
        yield


def fit_another(rank: int) -> Any:
    with another_formula():
        return fit_rank(rank, partial(Specimen, NAMES[0]), BATCHES, SplitRun())


def refused(rank: int) -> UlyssesError:
    with another_formula(), pytest.raises(UlyssesError) as caught:
        fit_rank(rank, partial(Specimen, NAMES[0]), BATCHES, SplitRun(strategy={"check_model": False}))
    return caught.value


def test_another_formula_runs_on_the_joined_sequence(pool: ProcessPool) -> None:
    with another_formula():
        reference = fit_single(partial(Specimen, NAMES[0]), [BATCHES], count_targets)
    for result in pool.run(fit_another, world_size=2):
        assert compare(result, reference).largest <= 1e-5


def test_another_formula_is_refused_without_the_check(pool: ProcessPool) -> None:
    for error in pool.run(refused, world_size=2):
        assert "Gemma2Attention, whose divided is not softmax attention" in str(error), error


@pytest.mark.parametrize("adds", [True, False])
def test_a_position_bias_is_part_of_the_formula(adds: bool) -> None:
    """That of a slice may have any shape and values: the formula is tried with others."""
    q = torch.randn(2, 4, 17, 8)

    def eager(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, position_bias: Tensor, **_: Any
    ) -> tuple[Tensor, None]:
        scores = q @ k.transpose(2, 3) * scaling + mask + (position_bias if adds else 0)
        return (scores.softmax(-1) @ v).transpose(1, 2), None

    bias = torch.zeros(1, 4, 17, 33)
    if adds:
        check_formula(eager, torch.nn.Identity(), q, q, q, 0.5, None, position_bias=bias)
        return
    with pytest.raises(UlyssesError, match="not softmax attention"):
        check_formula(eager, torch.nn.Identity(), q, q, q, 0.5, None, position_bias=bias)


def plain(rank: int) -> bool:
    """Outside of a step the model's own function runs, as a user calls it between two epochs."""
    from lightning_ulysses.testing import split_loader, split_trainer

    module, tokens = Specimen(NAMES[0]), torch.arange(9)[None] % VOCAB
    module.model.eval()
    wanted = module.model(tokens).logits

    def compare_outside(*args: Any) -> None:
        module.model.eval()
        found.append(torch.equal(module.model(tokens).logits, wanted))

    found: list[bool] = []
    module.on_fit_start = compare_outside  # type: ignore[method-assign]
    split_trainer(SplitRun()).fit(module, split_loader(BATCHES, SplitRun(), rank))
    return found == [True]


def test_outside_of_a_step_nothing_changes(pool: ProcessPool) -> None:
    assert pool.run(plain, world_size=2) == [True, True]
