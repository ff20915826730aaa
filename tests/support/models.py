"""Small models and batches for the tests."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_ulysses

VOCAB = 61


class LlamaModule(L.LightningModule):
    """A user's module around a transformers model; nothing in it knows about split sequences."""

    def __init__(
        self,
        heads: int = 4,
        kv_heads: int = 2,
        layers: int = 2,
        head_dim: int = 8,
        implementation: str = "sdpa",
        call: str = "batch",
        lr: float = 1.0,
        window: int | None = None,
        optimizer: str = "sgd",
    ) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "vocab_size": VOCAB,
            "hidden_size": heads * head_dim,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 256,
        }
        if window is None:
            self.model: Any = LlamaForCausalLM(LlamaConfig(**sizes))
        else:
            self.model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=window))
        self.model.config._attn_implementation = implementation
        self.call, self.lr, self.optimizer = call, lr, optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.call == "batch":
            return self.model(**batch).loss
        if self.call == "keywords":
            return self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        assert self.call == "inputs"
        return self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.training_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.training_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.model(input_ids=batch["input_ids"]).logits
        return {"logits": logits, "best": logits.argmax(-1), "name": "llama"}

    def configure_optimizers(self) -> Any:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=self.lr)
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, attention: str) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.attention = heads, kv_heads, attention
        self.head_dim = width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * kv_heads * self.head_dim)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.attention == "explicit":
            return lightning_ulysses.ulysses_attention(q, k, v, is_causal=True)
        causal = self.attention == "causal"
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=self.heads != self.kv_heads)

    def forward(self, x: Tensor) -> Tensor:
        B, S, _ = x.shape
        h = self.norm1(x)
        # (B, S, H * D) -> (B, S, H, D) -> (B, H, S, D)
        q = self.q(h).view(B, S, self.heads, self.head_dim).transpose(1, 2)
        k, v = self.kv(h).view(B, S, 2, self.kv_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        # (B, H, S, D) -> (B, S, H, D) -> (B, S, H * D)
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).reshape(B, S, -1))
        return x + self.mlp(self.norm2(x))


class HandWritten(L.LightningModule):
    """A GPT written by hand, on tuples ``(x, y)`` with ``y`` already shifted, or on mappings."""

    def __init__(
        self,
        heads: int = 4,
        kv_heads: int = 4,
        attention: str = "causal",
        positions: str = "sequence",
        loss: str = "cross_entropy",
        manual: bool = False,
        checkpointing: bool = False,
        head_dim: int = 8,
        lr: float = 1.0,
    ) -> None:
        super().__init__()
        torch.manual_seed(1)
        width = heads * head_dim
        self.embed, self.place = nn.Embedding(VOCAB, width), nn.Embedding(256, width)
        self.blocks = nn.ModuleList([Block(width, heads, kv_heads, attention) for _ in range(2)])
        self.head = nn.Linear(width, 1 if loss == "mse" else VOCAB)
        self.positions, self.loss, self.lr, self.checkpointing = positions, loss, lr, checkpointing
        self.automatic_optimization = not manual

    def forward(self, x: Tensor) -> Tensor:
        if self.positions == "sequence":
            place = lightning_ulysses.sequence_positions(x)
        else:
            place = torch.arange(x.shape[1], device=x.device)
        hidden = self.embed(x) + self.place(place)
        for block in self.blocks:
            if self.checkpointing:
                hidden = torch.utils.checkpoint.checkpoint(block, hidden, use_reentrant=False)
            else:
                hidden = block(hidden)
        return self.head(hidden)

    def _loss(self, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            x = batch["input_ids"]
            y = batch["shift_labels"] if "shift_labels" in batch else batch["labels"]
        else:
            x, y = batch
        logits = self(x)
        if self.loss == "mse":
            return F.mse_loss(logits.squeeze(-1), y)
        if self.loss == "masked":
            each = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none", ignore_index=-100)
            mask = (y.flatten() != -100).float()
            return (each * mask).sum() / mask.sum()
        if self.loss == "loss_mask":
            mask = batch["loss_mask"].flatten().float()
            each = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
            return (each * mask).sum() / mask.sum()
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self._loss(batch)
        if not self.automatic_optimization and self._trainer is not None:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def llama(**kwargs: Any) -> Any:
    """A picklable factory of `LlamaModule`."""
    return partial(LlamaModule, **kwargs)


def hand_written(**kwargs: Any) -> Any:
    """A picklable factory of `HandWritten`."""
    return partial(HandWritten, **kwargs)


class Warmer(HandWritten):
    """Embeds otherwise once the last position is high; so does every slice by its own last one."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.embed(batch["input_ids"]) * (2 if int(batch["position_ids"][0, -1]) >= 64 else 1)
        for block in self.blocks:
            hidden = block(hidden)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), batch["shift_labels"].flatten())


def token_batch(seed: int, seq_len: int = 32, rows: int = 1, labels: str = "even") -> dict[str, Tensor]:
    """``input_ids`` and ``labels`` of shape (B, S).

    Args:
        seed: Of the tokens.
        seq_len: S.
        rows: B.
        labels: ``"even"`` keeps all, ``"uneven"`` drops a seed-dependent part, ``"first_half"`` keeps labels in the
            first half only, ``"none"`` keeps none.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (rows, seq_len), generator=generator)
    target = tokens.clone()
    if labels == "uneven":
        target[:, : 3 + 5 * (seed % 4)] = -100
        target[torch.rand(target.shape, generator=generator) < 0.2] = -100
    elif labels == "first_half":
        target[:, seq_len // 2 - 1 :] = -100
    elif labels == "none":
        target[:] = -100
    return {"input_ids": tokens, "labels": target}


def pair_batch(seed: int, seq_len: int = 32, rows: int = 1, labels: str = "even") -> tuple[Tensor, Tensor]:
    """``(x, y)`` of shape (B, S), ``y`` shifted by hand."""
    batch = token_batch(seed, seq_len + 1, rows, labels)
    return batch["input_ids"][:, :-1].contiguous(), batch["labels"][:, 1:].contiguous()


def count_targets(batch: Any) -> float:
    """Valid next-token targets of a batch, counted independently of the package."""
    if isinstance(batch, (tuple, list)):
        return float((batch[1] != -100).sum()) if not batch[1].is_floating_point() else float(batch[1].numel())
    if "loss_mask" in batch:
        return float(batch["loss_mask"].sum())
    if "shift_labels" in batch:
        return float((batch["shift_labels"] != -100).sum())
    labels = batch["labels"] if "labels" in batch else batch["input_ids"]
    return float((labels[:, 1:] != -100).sum())
