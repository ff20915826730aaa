"""A loop of Fabric's, written as LitGPT's pretraining script is, on sequences split over processes.

Run it with ``python examples/fabric_litgpt.py``. It trains a small GPT on two CPU processes. The two lines that differ
from a script for one process are marked: the strategy, and the set-up of model and optimizer together, which DeepSpeed
asks for. The loop itself cuts rows of tokens into inputs and targets, numbers its micro-batches, sets the learning
rate, clips, logs, validates, saves and resumes.

Source: the public script ``litgpt/pretrain.py`` of Lightning-AI/litgpt, whose steps this follows.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ulysses import UlyssesFabricStrategy


@dataclass(frozen=True)
class Train:
    """What a run does."""

    max_steps: int = 24
    accumulation_iters: int = 2
    micro_batch_size: int = 4
    learning_rate: float = 1e-2
    min_lr: float = 1e-3
    warmup_iters: int = 4
    max_norm: float = 1.0
    interval: int = 12


class Block(nn.Module):
    """Causal attention and a feed-forward layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, width) -> (B, S, width)."""
        # (B, S, 3 * H * D) -> (B, S, 3, H, D) -> (3, B, H, S, D)
        q, k, v = self.attn(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        # (B, H, S, D) -> (B, S, H, D) -> (B, S, H * D)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """Numbers its positions itself, as most models do. It knows nothing about processes."""

    def __init__(self, vocab: int = 32, width: int = 32, heads: int = 4, max_seq_length: int = 64) -> None:
        super().__init__()
        self.max_seq_length = max_seq_length
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(max_seq_length, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(2))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        """(B, S) -> (B, S, vocab)."""
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
        for block in self.h:
            x = block(x)
        logits: Tensor = self.lm_head(self.ln_f(x))
        return logits


def chunked_cross_entropy(logits: Tensor, targets: Tensor, chunk_size: int = 128) -> Tensor:
    """The mean over tokens, () float, from logits (B, S, V) and targets (B, S)."""
    # (B, S, V) -> (B * S, V), (B, S) -> (B * S,)
    logits, targets = logits.reshape(-1, logits.size(-1)), targets.reshape(-1)
    parts = zip(logits.split(chunk_size), targets.split(chunk_size), strict=True)
    return torch.cat([F.cross_entropy(x, y, reduction="none") for x, y in parts]).mean()


def sequences(number: int, length: int, vocab: int = 32) -> Tensor:
    """(number, length) numbers modulo ``vocab``. Each row counts up in steps of its own."""
    generator = torch.Generator().manual_seed(0)
    begin = torch.randint(0, vocab, (number, 1), generator=generator)
    step = torch.randint(1, 5, (number, 1), generator=generator)
    return (begin + step * torch.arange(length)) % vocab


def endless(loader: Any) -> Iterator[Tensor]:
    """The batches of one epoch after the other."""
    while True:
        yield from loader


def learning_rate(train: Train, iteration: int, last: int) -> float:
    """A warm-up, then half a cosine."""
    if iteration < train.warmup_iters:
        return train.learning_rate * (iteration + 1) / train.warmup_iters
    done = (iteration - train.warmup_iters) / max(1, last - train.warmup_iters)
    return train.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (train.learning_rate - train.min_lr)


@torch.no_grad()
def validate(model: Any, rows: Tensor) -> float:
    """The loss of whole sequences, the same on every rank of a group."""
    model.eval()
    loss = chunked_cross_entropy(model(rows[:, :-1]), rows[:, 1:])
    model.train()
    return float(loss)


def fit(fabric: L.Fabric, state: dict[str, Any], loader: Any, held_out: Tensor, train: Train, out: Path) -> list[float]:
    """Trains to the last step, and returns the loss of each."""
    model, optimizer = state["model"], state["optimizer"]
    max_iters, window = train.max_steps * train.accumulation_iters, 0.0
    losses: list[float] = []
    for data in endless(loader):
        if state["iter_num"] >= max_iters:
            return losses
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, state["iter_num"], max_iters)
        state["iter_num"] += 1
        input_ids = data[:, : model.max_seq_length].contiguous().long()
        targets = data[:, 1 : model.max_seq_length + 1].contiguous().long()
        is_accumulating = state["iter_num"] % train.accumulation_iters != 0
        with fabric.no_backward_sync(model, enabled=is_accumulating):
            loss = chunked_cross_entropy(model(input_ids), targets)
            fabric.backward(loss / train.accumulation_iters)
        window += float(loss.detach()) / train.accumulation_iters
        if is_accumulating:
            continue
        fabric.clip_gradients(model, optimizer, max_norm=train.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        state["step_count"] += 1
        losses.append(window)
        window = 0.0
        if state["step_count"] % train.interval == 0:
            held_out_loss = validate(model, held_out)
            fabric.print(f"step {state['step_count']}: loss {losses[-1]:.3f}, val loss {held_out_loss:.3f}")
            fabric.save(out / f"step-{state['step_count']:04d}", state)
    return losses


def run(fabric: L.Fabric, train: Train, out: Path, resume: Path | None = None) -> list[float]:
    """Sets everything up, and trains."""
    fabric.seed_everything(0)
    model: Any = GPT()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=train.learning_rate)
    model, optimizer = fabric.setup(model, optimizer)  # the second changed line
    rows = sequences(160, model.max_seq_length + 1)
    plain: DataLoader[Any] = DataLoader(rows[16:], batch_size=train.micro_batch_size)  # type: ignore[arg-type]
    loader = fabric.setup_dataloaders(plain)
    state = {"model": model, "optimizer": optimizer, "iter_num": 0, "step_count": 0}
    if resume is not None:
        fabric.load(resume, state)
    return fit(fabric, state, loader, rows[:16], train, out)


def main() -> None:
    """Trains on two processes."""
    strategy = UlyssesFabricStrategy(sp_size=2)  # the first changed line
    fabric = L.Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    with tempfile.TemporaryDirectory() as folder:
        losses = run(fabric, Train(), Path(fabric.broadcast(folder)))
        fabric.barrier()
    fabric.print(f"loss {losses[-1]:.3f} after {len(losses)} steps")


if __name__ == "__main__":
    main()
