"""Other transformers models than Llama, unchanged: losses without a shift, learned positions, padding."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from models import VOCAB, token_batch
from torch import Tensor

from lightning_ulysses.processes import ProcessPool, RemoteError
from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("BertForMaskedLM", SIZES),
    "ModernBert": ("ModernBertForMaskedLM", {**SIZES, "local_attention": 256}),
    "Qwen3": ("Qwen3ForCausalLM", {**SIZES, "num_key_value_heads": 2, "head_dim": 16}),
    "GPT2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "Llama": ("LlamaForTokenClassification", {**SIZES, "num_key_value_heads": 2, "num_labels": VOCAB}),
}


class Wrapped(L.LightningModule):
    """A user's module around any transformers model with a loss."""

    def __init__(self, name: str) -> None:
        super().__init__()
        import transformers

        torch.manual_seed(0)
        kind, sizes = MODELS[name]
        config = getattr(transformers, f"{name}Config")(vocab_size=VOCAB, pad_token_id=0, **sizes)
        for key in [key for key in vars(config) if "dropout" in key or key.endswith("pdrop")] + ["classifier_dropout"]:
            setattr(config, key, 0.0)
        config._attn_implementation = "sdpa"
        self.model = getattr(transformers, kind)(config)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def masked_batch(seed: int, seq_len: int) -> dict[str, Tensor]:
    """Two rows, the second one padded, with labels at a few places only."""
    batch = token_batch(seed, seq_len, 2)
    hidden = torch.rand(2, seq_len, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask = torch.ones(2, seq_len, dtype=torch.long)
    mask[1, seq_len - 7 :] = 0
    batch["labels"] = batch["labels"].masked_fill(hidden | (mask == 0), -100)
    return {**batch, "attention_mask": mask}


def count(batch: dict[str, Tensor], shifted: bool) -> float:
    return float((batch["labels"][:, 1:] != -100).sum() if shifted else (batch["labels"] != -100).sum())


@pytest.mark.parametrize("name", [name for name in MODELS if name != "ModernBert"])
def test_one_step(pool: ProcessPool, name: str) -> None:
    make = partial(Wrapped, name)
    batches = [masked_batch(seed, 33) for seed in range(2)]
    shifted = "LM" in MODELS[name][0] and "Masked" not in MODELS[name][0]
    reference = fit_single(make, [batches], partial(count, shifted=shifted))
    run = SplitRun(trainer={"accumulate_grad_batches": 2})
    for result in fit_split(pool, make, batches, run):
        assert compare(result, reference).largest <= 1e-5, compare(result, reference)


def test_a_mask_that_is_not_known_is_refused_by_name(pool: ProcessPool) -> None:
    with pytest.raises(RemoteError, match="sliding_window_bidirectional_overlay"):
        fit_split(pool, partial(Wrapped, "ModernBert"), [masked_batch(0, 33)], SplitRun())
