"""Direct preference optimization, with the step as it is written for one process.

Run it with ``python examples/dpo.py``. It trains a tiny Llama on two CPU processes to prefer sequences that count up to
sequences that count down. The loss is no mean over tokens: it is made of sums over whole rows. So the strategy splits
the model in its blocks by itself, and says so in one line. Logits stay divided over the processes.

Source: arXiv 2305.18290.
"""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_ulysses  # noqa: F401  registers the strategies

VOCAB = 32


class DPO(L.LightningModule):
    """A policy and its frozen reference. Batches hold preferred and rejected rows with the same prompts.

    Args:
        beta: How much the policy may leave the reference; a larger number keeps it closer.
    """

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        self.policy = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes))
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        self.beta = beta

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The mean over pairs of -log sigmoid(beta * (preferred - rejected))."""
        # (2 * B, S): preferred rows first
        tokens = torch.cat([batch["preferred"], batch["rejected"]])
        with torch.no_grad():
            before = log_likelihood(self.reference, tokens)
        gain = log_likelihood(self.policy, tokens) - before
        # (2 * B,) -> (B,) and (B,)
        preferred, rejected = gain.chunk(2)
        self.log("accuracy", (preferred > rejected).float().mean())
        loss = -F.logsigmoid(self.beta * (preferred - rejected)).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on the policy."""
        return torch.optim.AdamW(self.policy.parameters(), lr=3e-3)


def log_likelihood(model: Any, tokens: Tensor) -> Tensor:
    """Of each row after its first token, (B, S) -> (B,)."""
    # (B, S, V) -> (B, S - 1, V)
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    # (B, S - 1, 1) -> (B, S - 1) -> (B,)
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0].sum(1)


def pairs(number: int, length: int = 48) -> list[dict[str, Tensor]]:
    """Rows (S,) that begin alike; the preferred one counts up, the rejected one down."""
    begin = torch.randint(0, VOCAB, (number, 1), generator=torch.Generator().manual_seed(0))
    up, down = ((begin + sign * torch.arange(length)) % VOCAB for sign in (1, -1))
    return [{"preferred": good, "rejected": bad} for good, bad in zip(up, down, strict=True)]


def main() -> None:
    """Trains on two processes."""
    L.seed_everything(0)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        max_epochs=1,
        strategy="ulysses_deepspeed",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    loader: DataLoader[Any] = DataLoader(pairs(128), batch_size=8)  # type: ignore[arg-type]
    trainer.fit(DPO(), loader)
    if trainer.is_global_zero:
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        print(f"loss {values['loss']:.3f}, accuracy {values['accuracy']:.2f} after {trainer.global_step} steps")


if __name__ == "__main__":
    main()
