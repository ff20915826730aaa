"""A plan written by hand: a model that numbers its positions itself is split after that, and stays as it is.

Run it with ``python examples/plan.py``. It trains a few steps on two CPU processes. ``Model`` adds positions that count
from 0, and accepts no others. If the batches were cut, both halves of a sequence would get the same positions, and the
strategy would refuse the model. With `PLAN`, each rank computes embedding and positions for the whole sequence. The
input of the first block is split, and the logits are joined. So the loss in ``training_step`` is that of the whole
sequence.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ulysses import UlyssesDeepSpeedStrategy

# For each submodule the input (or output) and the dimension that carries the sequence. As `plan:` of a LightningCLI
# config, it reads the same in YAML.
PLAN: dict[str, Any] = {
    "split": {"blocks.*": {"h": 1}},
    "join": {"head": 1},
}


class Block(nn.Module):
    """Causal attention and a feed-forward layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        """(B, S, width) -> (B, S, width)."""
        # (B, S, 3 * H * D) -> (B, S, 3, H, D) -> (3, B, H, S, D)
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        # (B, H, S, D) -> (B, S, H, D) -> (B, S, H * D)
        h = h + self.out(attended.transpose(1, 2).flatten(2))
        return h + self.mlp(h)


class Model(L.LightningModule):
    """Predicts the next number in sequences that count up in steps. It knows nothing about processes."""

    def __init__(self, vocab: int = 32, width: int = 32, heads: int = 4, longest: int = 256) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocab, width), nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(2))
        self.head = nn.Linear(width, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, S) -> (B, S, vocab)."""
        h = self.embed(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            h = block(h)
        logits: Tensor = self.head(h)
        return logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The mean cross entropy of the whole sequences. It shifts the tokens itself."""
        logits = self(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on all parameters."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def sequences(number: int, length: int = 66, vocab: int = 32) -> Tensor:
    """(number, length) numbers modulo ``vocab``. Each row counts up in steps of its own."""
    generator = torch.Generator().manual_seed(0)
    begin = torch.randint(0, vocab, (number, 1), generator=generator)
    step = torch.randint(1, 5, (number, 1), generator=generator)
    return (begin + step * torch.arange(length)) % vocab


def main() -> None:
    """Trains on two processes."""
    L.seed_everything(0)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        max_epochs=1,
        strategy=UlyssesDeepSpeedStrategy(sp_size=2, plan=PLAN),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    loader: DataLoader[Any] = DataLoader(sequences(160), batch_size=8)  # type: ignore[arg-type]
    trainer.fit(Model(), loader)
    if trainer.is_global_zero:
        print(f"loss {float(trainer.callback_metrics['loss']):.3f} after {trainer.global_step} steps")


if __name__ == "__main__":
    main()
