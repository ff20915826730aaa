"""Models of transformers that check the shape of positions, or are causal by their mask alone."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import transformers
from exact import BOUND, check, fit_broken
from models import VOCAB, count_targets, token_batch
from torch import Tensor
from transformers import GemmaConfig, GemmaForCausalLM
from zoo import HEADS

from lightning_ulysses.interceptors.transformers import model_inputs
from lightning_ulysses.testing import SplitRun, compare, fit_single
from lightning_ulysses.testing.processes import ProcessPool, RemoteError

SIZES = {**HEADS, "vocab_size": VOCAB, "pad_token_id": 0}
BATCHES = [token_batch(seed, 33, 2, "uneven") for seed in (1, 2)]
TWICE = SplitRun(trainer={"accumulate_grad_batches": 2})
MASKS = "lightning_ulysses.interceptors.transformers.masks"


class Strict(GemmaForCausalLM):
    """Takes positions of the shape that transformers documents, and no other."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        assert position_ids is None or position_ids.shape == input_ids.shape
        return super().forward(input_ids, position_ids=position_ids, **kwargs)


class Module(L.LightningModule):
    """A user's module around a model whose attention is causal only where a mask says so."""

    def __init__(self, cls: type[GemmaForCausalLM], is_causal: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = cls(GemmaConfig(**SIZES, use_bidirectional_attention=not is_causal))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def strict() -> Module:
    return Module(Strict, is_causal=True)


def unmasked() -> Module:
    return Module(GemmaForCausalLM, is_causal=False)


def one_row(batch: Any, tokens: Tensor, rank: int) -> Tensor:
    begin = batch.layout.starts[rank]
    return torch.arange(begin, begin + tokens.shape[1])[None]


def test_positions_have_the_documented_shape(pool: ProcessPool) -> None:
    check(pool, strict, BATCHES, TWICE)


def test_one_row_of_positions_is_not_what_such_a_model_takes(pool: ProcessPool) -> None:
    target = f"{model_inputs.__name__}._positions"
    run = SplitRun(strategy={"split": "batch"}, trainer=TWICE.trainer)
    with pytest.raises(RemoteError) as failure:
        pool.run(fit_broken, strict, BATCHES, run, target, one_row, world_size=2)
    assert isinstance(failure.value.cause, AssertionError)


def masked(batch: dict[str, Tensor], kept: int) -> dict[str, Tensor]:
    """With a padding mask that leaves tokens out, or none of them."""
    mask = torch.ones_like(batch["input_ids"])
    mask[0, kept:] = 0
    return {**batch, "attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}


@pytest.mark.parametrize(("kept", "split"), [(None, "batch"), (33, "blocks"), (29, "batch")])
def test_a_mask_that_is_left_out_is_the_modules(pool: ProcessPool, kept: int | None, split: str) -> None:
    """Without padding, transformers makes no mask, so that tokens see those behind them; with padding it is causal."""
    batches = BATCHES if kept is None else [masked(batch, kept) for batch in BATCHES]
    check(pool, unmasked, batches, SplitRun(strategy={"split": split}, trainer=TWICE.trainer))


def never(*args: Any) -> bool:
    return False


def test_the_mask_itself_would_be_causal(pool: ProcessPool) -> None:
    reference = fit_single(unmasked, [BATCHES], count_targets)
    run = SplitRun(strategy={"check_model": False}, trainer=TWICE.trainer)
    for result in pool.run(fit_broken, unmasked, BATCHES, run, f"{MASKS}._is_left_out", never, world_size=2):
        assert compare(result, reference).largest > BOUND


def test_transformers_leaves_out_what_is_taken_for_left_out() -> None:
    model = transformers.GemmaModel(GemmaConfig(**SIZES, use_bidirectional_attention=True))
    one, other = (model(BATCHES[0]["input_ids"], attention_mask=mask)[0] for mask in (None, torch.ones(2, 33)))
    changed = BATCHES[0]["input_ids"].clone()
    changed[:, -1] = 5
    assert torch.equal(one, other) and not torch.equal(one[:, 0], model(changed)[0][:, 0])
