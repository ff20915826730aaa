"""Other transformers models than Llama, unchanged: losses without a shift, learned positions, padding."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from models import VOCAB, count_targets, pair_batch, token_batch
from torch import Tensor, nn

import lightning_ulysses
from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool, RemoteError

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("BertForMaskedLM", SIZES),
    "ModernBert": ("ModernBertForMaskedLM", {**SIZES, "local_attention": 8}),
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


@pytest.mark.parametrize("name", MODELS)
def test_one_step(pool: ProcessPool, name: str) -> None:
    make = partial(Wrapped, name)
    batches = [masked_batch(seed, 33) for seed in range(2)]
    shifted = "LM" in MODELS[name][0] and "Masked" not in MODELS[name][0]
    reference = fit_single(make, [batches], partial(count, shifted=shifted))
    run = SplitRun(trainer={"accumulate_grad_batches": 2})
    for result in fit_split(pool, make, batches, run):
        assert compare(result, reference).largest <= 1e-5, compare(result, reference)


class OwnMask(Wrapped):
    """Asks transformers for a mask of its own making."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        from transformers.masking_utils import create_causal_mask

        def prefix(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
            return kv_idx < 5

        embeds = self.model.get_input_embeddings()(batch["input_ids"])
        create_causal_mask(self.model.config, embeds, None, None, or_mask_function=prefix)
        return super().training_step(batch, batch_idx)


def test_a_mask_that_is_not_known_is_refused_by_name(pool: ProcessPool) -> None:
    with pytest.raises(RemoteError, match=r"an attention mask made of \['or_masks'\]"):
        fit_split(pool, partial(OwnMask, "Llama"), [masked_batch(0, 33)], SplitRun(strategy={"check_model": False}))


class Encoder(L.LightningModule):
    """PyTorch's own encoder layers, with positions as the package gives them."""

    def __init__(self, weights: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.place = nn.Embedding(VOCAB, 32), nn.Embedding(64, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.last = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head, self.weights = nn.Linear(32, VOCAB), weights

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        hidden = self.encoder(self.embed(x) + self.place(lightning_ulysses.sequence_positions(x)))
        hidden = self.last(hidden, hidden, hidden, need_weights=self.weights)[0]
        return F.cross_entropy(self.head(hidden).flatten(0, 1), y.flatten())

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def validate_encoder(rank: int) -> float:
    run = SplitRun()
    trainer = split_trainer(run, [lightning_ulysses.TokenCountMonitor()])
    found = trainer.validate(Encoder(), split_loader([pair_batch(1, 33)], run, rank), verbose=False)
    return float(found[0]["validate/loss"])


def test_torch_encoder_layers(pool: ProcessPool) -> None:
    batches = [pair_batch(1, 33)]
    reference = fit_single(Encoder, [batches], count_targets)
    for result in fit_split(pool, Encoder, batches, SplitRun()):
        assert compare(result, reference).largest <= 1e-5
    # Evaluation would take PyTorch's fused path, which nothing can intercept.
    wanted = Encoder().eval()
    with torch.no_grad():
        loss = float(wanted.training_step(batches[0], 0))
    assert pool.run(validate_encoder, world_size=2) == pytest.approx([loss, loss], rel=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()


def test_attention_weights_by_default(pool: ProcessPool) -> None:
    """None comes back for them; the output is what it is with them."""
    batches = [pair_batch(1, 33)]
    make = partial(Encoder, True)
    reference = fit_single(make, [batches], count_targets)
    for result in fit_split(pool, make, batches, SplitRun()):
        assert compare(result, reference).largest <= 1e-5
