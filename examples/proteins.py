"""A masked language model of proteins, on padded rows of several lengths.

Run it with ``python examples/proteins.py``. It trains a tiny ESM on two CPU processes to fill in amino acids. Labels
are made with the data, -100 where nothing was masked, and the loss is the mean over all others. So the batch is cut,
and each process weighs its slice by the targets in it. Genomes are the same program with other letters: ``genomes``.

Source: Lin et al., 10.1126/science.ade2574.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import EsmConfig, EsmForMaskedLM

import lightning_ulysses  # noqa: F401  registers the strategies

PAD, MASK, ACIDS, BASES = 0, 1, "LAGVSERTIDPKQNFYMHWC", "ACGT"


class ProteinModel(L.LightningModule):
    """Predicts masked letters.

    Args:
        letters: Of the alphabet.
    """

    def __init__(self, letters: str = ACIDS) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        rest: dict[str, Any] = {
            "position_embedding_type": "rotary",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "token_dropout": False,
        }
        rest |= {"vocab_size": 2 + len(letters), "pad_token_id": PAD, "mask_token_id": MASK}
        self.model = EsmForMaskedLM(EsmConfig(**sizes, **rest))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The mean cross entropy over masked letters."""
        loss: Tensor = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def proteins(number: int, longest: int = 60, letters: str = ACIDS) -> list[dict[str, Tensor]]:
    """Rows of ``input_ids``, ``attention_mask`` and ``labels``, (S,) each. A motif repeats along each of them."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(number):
        motif = 2 + (torch.randint(0, 4, (1,), generator=generator) + torch.arange(4)) % len(letters)
        length = int(torch.randint(longest // 2, longest, (1,), generator=generator))
        tokens = motif.repeat(longest)[:longest]
        is_real = torch.arange(longest) < length
        is_masked = (torch.rand(longest, generator=generator) < 0.15) & is_real
        rows.append(
            {
                "input_ids": tokens.masked_fill(~is_real, PAD).masked_fill(is_masked, MASK),
                "attention_mask": is_real.long(),
                "labels": tokens.masked_fill(~is_masked, -100),
            }
        )
    return rows


def genomes(number: int) -> list[dict[str, Tensor]]:
    """The same of DNA."""
    return proteins(number, longest=120, letters=BASES)


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
    loader: DataLoader[Any] = DataLoader(proteins(160), batch_size=8)  # type: ignore[arg-type]
    trainer.fit(ProteinModel(), loader)
    if trainer.is_global_zero:
        print(f"loss {float(trainer.callback_metrics['loss']):.3f} after {trainer.global_step} steps")


if __name__ == "__main__":
    main()
