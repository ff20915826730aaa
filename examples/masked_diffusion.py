"""Masked diffusion of tokens: each row is masked at a rate of its own, drawn in the step.

Run it with ``python examples/masked_diffusion.py``. It trains a tiny BERT on two CPU processes to fill in sequences
that count up. The rate of a row and the mask are drawn from torch's generators: all processes draw the same, as one
process would. Each masked token counts by 1 / rate, so the loss is no mean over targets. The strategy splits the model
in its blocks by itself, and says so in one line.

A masked language model of proteins is the same program with ``EsmForMaskedLM`` and a fixed rate.

Source: arXiv 2406.07524.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM

import lightning_ulysses  # noqa: F401  registers the strategies

VOCAB, MASK = 33, 32


class MaskedDiffusion(L.LightningModule):
    """Predicts what was masked, from all that was not."""

    def __init__(self, longest: int = 128) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = BertConfig(vocab_size=VOCAB, max_position_embeddings=longest, **sizes, **dropout)
        self.model = BertForMaskedLM(config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The bound on the negative log-likelihood, in nats a token."""
        tokens = batch["tokens"]  # (B, S)
        rate = 0.1 + 0.9 * torch.rand(len(tokens), 1, device=tokens.device)  # (B, 1)
        is_masked = torch.rand(tokens.shape, device=tokens.device) < rate
        logits = self.model(input_ids=tokens.masked_fill(is_masked, MASK)).logits
        # (B, S, V) -> (B, V, S), for which cross_entropy gives (B, S)
        each = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
        loss = (each * is_masked / rate).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def sequences(number: int, length: int = 48) -> list[dict[str, Tensor]]:
    """Rows (S,) that count up from 0, 1, 2 or 3."""
    begin = torch.randint(0, 4, (number, 1), generator=torch.Generator().manual_seed(0))
    return [{"tokens": row} for row in (begin + torch.arange(length)) % MASK]


def main() -> None:
    """Trains on two processes."""
    L.seed_everything(0)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        max_epochs=3,
        strategy="ulysses_deepspeed",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    loader: DataLoader[Any] = DataLoader(sequences(160), batch_size=8)  # type: ignore[arg-type]
    trainer.fit(MaskedDiffusion(), loader)
    if trainer.is_global_zero:
        print(f"loss {float(trainer.callback_metrics['loss']):.3f} after {trainer.global_step} steps")


if __name__ == "__main__":
    main()
