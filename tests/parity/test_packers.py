"""Batches as packers of others make them: boundaries, numbers of documents, masks that number documents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact import BOUND, fit_broken
from models import VOCAB, LlamaModule, count_targets, token_batch
from torch import Tensor, nn

from lightning_ulysses import UlyssesDeepSpeedStrategy
from lightning_ulysses.testing import SplitRun, compare, fit_single, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool
from lightning_ulysses.testing.runs import StepRecorder


class Uncached(LlamaModule):
    """In one process, transformers looks for documents only where there is no cache."""

    def __init__(self) -> None:
        super().__init__()
        self.model.config.use_cache = False


class ByNumber(LlamaModule):
    """Written by hand: tokens with the same number see each other."""

    def __init__(self) -> None:
        super().__init__(layers=1, lr=0.1)
        torch.manual_seed(0)
        self.model = nn.Embedding(VOCAB, 32)
        self.blocks = nn.ModuleList(_Block() for _ in range(2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        numbers = batch["attention_mask"]
        mask = (numbers[:, None, :, None] == numbers[:, None, None, :]).tril()
        hidden = self.model(batch["input_ids"])
        for block in self.blocks:
            hidden = block(hidden, mask)
        logits = hidden @ self.model.weight.T
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        # (B, S_r, 3 * D) -> 3 * (B, 4, S_r, D / 4)
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.qkv(hidden).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        # (B, 4, S_r, D / 4) -> (B, S_r, D)
        return hidden + self.out(attended.transpose(1, 2).flatten(2))


def flattened(**settings: Any) -> dict[str, Any]:
    """Documents of 12, 1 and 20 tokens."""
    from transformers import DataCollatorWithFlattening

    tokens = token_batch(3, 33)["input_ids"][0].tolist()
    parts = tokens[:12], tokens[12:13], tokens[13:]
    return dict(DataCollatorWithFlattening(**settings)([{"input_ids": part, "labels": part} for part in parts]))


def numbered() -> dict[str, Any]:
    """1, 1, ..., 2, 2, ..., 3, 3 in the first row; 0 is padding."""
    batch, numbers = token_batch(3, 33, 2), torch.ones(2, 33, dtype=torch.long)
    numbers[0, 12:], numbers[0, 25:], numbers[1, 20:], numbers[1, 30:] = 2, 3, 2, 0
    return {**batch, "labels": batch["labels"].masked_fill(numbers == 0, -100), "attention_mask": numbers}


def fit(rank: int, make: Any, batch: Any) -> Any:
    """The step, and where it is split."""
    run, recorder = SplitRun(), StepRecorder()
    trainer = split_trainer(run, [recorder])
    trainer.fit(make(), split_loader([batch], run, rank))
    assert isinstance(trainer.strategy, UlyssesDeepSpeedStrategy)
    return recorder.result(), trainer.strategy.core.split_of("train")


CASES: dict[str, tuple[Any, Any, str]] = {
    "flash-attn's arguments": (Uncached, {"return_flash_attn_kwargs": True}, "batch"),
    "all that a collator gives": (Uncached, {"return_flash_attn_kwargs": True, "return_seq_idx": True}, "batch"),
    "numbered mask of transformers": (Uncached, None, "batch"),
    "numbered mask by hand": (ByNumber, None, "blocks"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_step_is_that_of_one_process(pool: ProcessPool, case: str) -> None:
    make, settings, where = CASES[case]
    batch = numbered() if settings is None else flattened(**settings)
    wanted = fit_single(make, [[batch]], count_targets)
    for result, split in pool.run(fit, make, batch, world_size=2):
        assert compare(result, wanted).largest <= BOUND, compare(result, wanted)
        assert split == where


def no_documents(*args: Any) -> None:
    return None


def test_without_boundaries_it_is_another_step(pool: ProcessPool) -> None:
    batch = flattened(return_flash_attn_kwargs=True, return_seq_idx=True)
    wanted = fit_single(Uncached, [[batch]], count_targets)
    target = "lightning_ulysses.batch.whole.document_runs"
    with_nothing = "lightning_ulysses.batch.whole.sequences_without_cache"
    for result in pool.run(broken, batch, (target, with_nothing), world_size=2):
        assert compare(result, wanted).step > 1e-3


def broken(rank: int, batch: Any, targets: tuple[str, str]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets[1], no_documents)
        return fit_broken(rank, Uncached, [batch], SplitRun(), targets[0], no_documents)
