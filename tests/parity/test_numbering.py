"""Models that number their tokens by what is padding: RoBERTa and its relatives."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from models import VOCAB, token_batch
from torch import Tensor

from lightning_ulysses.geometry.distance import largest
from lightning_ulysses.interceptors.transformers.positions import Numbering
from lightning_ulysses.testing import SplitRun, compare, fit_rank, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool

PAD = 1


class Numbered(L.LightningModule):
    """A masked language model."""

    def __init__(self, family: str = "Roberta", call: str = "batch") -> None:
        super().__init__()
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=48,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=PAD,
            initializer_range=0.2,
        )
        config._attn_implementation = "sdpa"
        self.model, self.call = getattr(transformers, f"{family}ForMaskedLM")(config), call

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.call == "embeddings":
            embedded = self.model.get_input_embeddings()(batch["input_ids"])
            return self.model(inputs_embeds=embedded, labels=batch["labels"]).loss
        withheld = {key: value for key, value in batch.items() if key != "position_ids"}
        return self.model(**withheld).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def padded(seed: int) -> dict[str, Tensor]:
    """Padding on the left of one row, on the right of another, and none in the third."""
    batch = token_batch(seed, 33, 3, "uneven")
    batch["input_ids"] = batch["input_ids"].clamp_min(PAD + 1)
    mask = torch.ones(3, 33, dtype=torch.long)
    mask[0, :20], mask[1, -18:] = 0, 0
    batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    return {
        "input_ids": batch["input_ids"].masked_fill(mask == 0, PAD),
        "labels": batch["labels"],
        "attention_mask": mask,
    }


def count(batch: dict[str, Tensor]) -> float:
    return float((batch["labels"] != -100).sum())


PADDED = [padded(seed) for seed in range(2)]
# Two documents in one row, the second with padding in it.
DOCUMENTS = [
    {key: value[:, :length] for key, value in token_batch(seed, 33, 1).items()} for seed, length in ((4, 20), (5, 13))
]
PACKED: dict[str, Tensor] = {
    **{key: torch.cat([document[key] for document in DOCUMENTS], dim=1) for key in ("input_ids", "labels")},
    "position_ids": torch.cat([torch.arange(20), torch.arange(13)])[None],
}
CASES: dict[str, tuple[Any, list[Any], list[list[Any]], SplitRun]] = {
    "padding": (Numbered, PADDED, [[batch] for batch in PADDED], SplitRun()),
    "padding on four ranks": (partial(Numbered, "XLMRoberta"), PADDED[:1], [PADDED[:1]], SplitRun(4, 4, {"stage": 3})),
    "packed": (partial(Numbered, "Camembert"), [PACKED], [DOCUMENTS], SplitRun()),
    "embeddings": (partial(Numbered, call="embeddings"), PADDED[:1], [PADDED[:1]], SplitRun()),
    "padded by the strategy": (Numbered, PADDED[:1], [PADDED[:1]], SplitRun(strategy={"pad_to_multiple_of": 46})),
}


@pytest.mark.parametrize("case", CASES)
def test_the_step_is_exact(pool: ProcessPool, case: str) -> None:
    make, batches, steps, run = CASES[case]
    reference = fit_single(make, steps, count)
    assert largest(compare(result, reference).largest for result in fit_split(pool, make, batches, run)) <= 1e-5


def not_numbered(rank: int, run: SplitRun) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Numbering, "install", lambda *args: None)
        return fit_rank(rank, Numbered, PADDED, run)


def test_plain_positions_are_wrong(pool: ProcessPool) -> None:
    reference = fit_single(Numbered, [[batch] for batch in PADDED], count)
    result = pool.run(not_numbered, SplitRun(strategy={"check_model": False}), world_size=2)[0]
    assert compare(result, reference).step > 1e-3
