"""Models that number their positions inside, shaped like LitGPT's ``GPT`` and like a transformer of diffusers."""

from __future__ import annotations

from functools import partial
from typing import Any

import deepspeed
import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import VOCAB, token_batch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D), cos and sin (1, T, D)."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos[:, None] + turned * sin[:, None]


def rotary(length: int, size: int) -> tuple[Tensor, Tensor]:
    """Each (length, size)."""
    angles = torch.outer(torch.arange(length).float(), 10000 ** (-torch.arange(0, size, 2).float() / size))
    return torch.cat([angles, angles], dim=-1).cos(), torch.cat([angles, angles], dim=-1).sin()


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, groups: int, takes_prefix: bool = False) -> None:
        super().__init__()
        self.heads, self.groups, self.size, self.takes_prefix = heads, groups, width // heads, takes_prefix
        self.qkv = nn.Linear(width, (heads + 2 * groups) * self.size)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.size()
        if self.takes_prefix:
            cos, sin = cos[:, :T], sin[:, :T]
        q, k, v = self.qkv(x).split([n * self.size for n in (self.heads, self.groups, self.groups)], dim=-1)
        # (B, T, heads * D) -> (B, T, heads, D) -> (B, heads, T, D)
        q, k, v = (t.view(B, T, -1, self.size).transpose(1, 2) for t in (q, k, v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        # (B, H, T, D) -> (B, T, H, D) -> (B, T, H * D)
        return self.proj(y.transpose(1, 2).reshape(B, T, -1))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, groups: int, takes_prefix: bool, checkpoints_attention: bool) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads, groups, takes_prefix)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.checkpoints_attention = checkpoints_attention

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, input_pos: Tensor | None = None
    ) -> Tensor:
        if self.checkpoints_attention:
            x = checkpoint(self.attn, self.norm_1(x), cos, sin, use_reentrant=False) + x
        else:
            x = self.attn(self.norm_1(x), cos, sin) + x
        return self.mlp(self.norm_2(x)) + x


class Again(torch.autograd.Function):
    """A checkpoint of one's own."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, x: Tensor, *rest: Tensor) -> Tensor:
        ctx.block, ctx.inputs = block, (x.detach(), *rest)
        with torch.no_grad():
            return block(x, *rest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x = ctx.inputs[0].requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.block(x, *ctx.inputs[1:]), grads[0])
        return None, x.grad, None, None


class GPT(nn.Module):
    """Shaped like LitGPT's: the same names, and positions from a buffer that it cuts itself."""

    def __init__(
        self,
        width: int = 32,
        heads: int = 4,
        groups: int = 2,
        mixes: bool = False,
        takes_prefix: bool = False,
        checkpoints: str = "",
    ) -> None:
        super().__init__()
        self.lm_head = nn.Linear(width, VOCAB, bias=False)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, width),
                "h": nn.ModuleList(
                    Block(width, heads, groups, takes_prefix, checkpoints == "attention") for _ in range(2)
                ),
                "ln_f": nn.LayerNorm(width),
            }
        )
        if mixes:
            self.before = nn.TransformerEncoderLayer(width, heads, width, dropout=0.0, batch_first=True)
            self.transformer.h[1].mlp = Scan()
        self.encoder = nn.TransformerEncoderLayer(width, heads, width, 0.0, batch_first=True) if checkpoints else None
        self.checkpoints = checkpoints
        cos, sin = rotary(64, width // heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, idx: Tensor) -> Tensor:
        T = idx.size(1)
        cos, sin = self.cos[:T].unsqueeze(0), self.sin[:T].unsqueeze(0)
        x = self.transformer.wte(idx)
        if self.encoder is not None:
            # Attends before the split, on the whole sequence.
            x = x + checkpoint(self.encoder, x, use_reentrant=False)
        for block in self.transformer.h:
            if self.checkpoints in ("block", "reentrant"):
                x = checkpoint(block, x, cos, sin, use_reentrant=self.checkpoints == "reentrant")
            elif self.checkpoints == "deepspeed" and dist.is_initialized():
                x = deepspeed.checkpointing.checkpoint(block, x, cos, sin)
            elif self.checkpoints == "unknown":
                x = Again.apply(block, x, cos, sin)
            else:
                x = block(x, cos, sin, None, None)
        return self.lm_head(self.transformer.ln_f(x))


class Scan(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.cumsum(dim=1) / h.shape[1]


class LitModule(L.LightningModule):
    """A user's module around a GPT; nothing in it knows about split sequences, unless it takes ``shift_labels``."""

    def __init__(self, loss: str = "shifts", calls: int = 1, dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.gpt = GPT(**kwargs)
        self.loss, self.calls, self.dropout = loss, calls, nn.Dropout(dropout)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, Tensor):
            return F.cross_entropy(self.gpt(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        if isinstance(batch, (tuple, list)):
            return F.cross_entropy(self.gpt(batch[0]).flatten(0, 1), batch[1].flatten())
        logits = self.dropout(self.gpt(batch["input_ids"]))
        if self.calls == 2:
            # Another length than that of the batch.
            logits = logits + self.gpt(batch["input_ids"][:, :-6]).mean(dim=1, keepdim=True)
        if self.loss == "shifts":
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        return F.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.training_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.gpt(batch["input_ids"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, rotary_emb: Any = None
    ) -> Any:
        memory = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        # (B, S, H * D) -> (B, S, H, D) -> (B, H, S, D)
        q, k, v = (
            layer(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, t in ((self.to_q, hidden_states), (self.to_k, memory), (self.to_v, memory))
        )
        if rotary_emb is not None:
            q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ImageBlock(nn.Module):
    """The order and names of a block of diffusers."""

    def __init__(self, width: int, heads: int, forgets_text: bool) -> None:
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(width, heads), CrossAttention(width, heads)
        self.modulation = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width)
        self.ff = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.forgets_text = forgets_text

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any) -> Tensor:
        shift, scale = self.modulation(temb)[:, None].chunk(2, dim=-1)
        h = hidden_states
        h = h + self.attn1(self.norm(h) * (1 + scale) + shift, rotary_emb=rotary_emb)
        h = h + self.attn2(h, None if self.forgets_text else encoder_hidden_states)
        return h + self.ff(h)


class ImageTransformer(nn.Module):
    """Cuts an image into patches, numbers them in a grid, and puts them together again."""

    def __init__(self, width: int = 32, heads: int = 4, channels: int = 3, forgets_text: bool = False) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(channels, width, 2, 2)
        self.text_embedding = nn.Linear(8, width)
        self.time_embedding = nn.Linear(1, width)
        self.blocks = nn.ModuleList(ImageBlock(width, heads, forgets_text) for _ in range(2))
        self.norm_out, self.proj_out = nn.LayerNorm(width), nn.Linear(width, 4 * channels)
        self.size = width // heads

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        B, C, height, width = hidden_states.shape
        # (B, C, height, width) -> (B, W, height / 2, width / 2) -> (B, S, W)
        h = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2)
        emb = tuple(table[None] for table in rotary(h.shape[1], self.size))
        temb = self.time_embedding(timestep[:, None])
        text = self.text_embedding(encoder_hidden_states)
        for block in self.blocks:
            h = block(h, text, temb, rotary_emb=emb)
        h = self.proj_out(self.norm_out(h) + temb[:, None])
        # (B, S, 4 * C) -> (B, height / 2, width / 2, 2, 2, C) -> (B, C, height, width)
        h = h.view(B, height // 2, width // 2, 2, 2, C).permute(0, 5, 1, 3, 2, 4)
        return h.reshape(B, C, height, width)


class Denoiser(L.LightningModule):
    """Learns the noise that it adds to images."""

    def __init__(self, seed: str = "", **kwargs: Any) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.transformer, self.seed = ImageTransformer(**kwargs), seed

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images = batch["images"]
        generator = None
        if self.seed == "rank":
            generator = torch.Generator().manual_seed(self.global_rank)
        noise = batch["noise"] if not self.seed else torch.randn(images.shape, generator=generator)
        time = batch["time"]
        noisy = images + time[:, None, None, None] * noise
        return F.mse_loss(self.transformer(noisy, time, batch["text"]), noise)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def lit(**kwargs: Any) -> Any:
    """A picklable factory of `LitModule`."""
    return partial(LitModule, **kwargs)


def denoiser(**kwargs: Any) -> Any:
    """A picklable factory of `Denoiser`."""
    return partial(Denoiser, **kwargs)


def image_batch(seed: int, rows: int = 2, height: int = 6, width: int = 22, text: int = 5) -> dict[str, Tensor]:
    """Images (B, 3, height, width) that make S = height * width / 4 patches, 33 by default."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"images": (rows, 3, height, width), "noise": (rows, 3, height, width), "text": (rows, text, 8)}
    batch = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return {**batch, "time": torch.rand(rows, generator=generator)}


def count_samples(batch: dict[str, Tensor]) -> float:
    """Over which the loss of a `Denoiser` is a mean."""
    return float(len(batch["images"]))


def text_batches(count: int, labels: str = "uneven") -> list[Any]:
    """Batches of S = 33."""
    return [token_batch(seed, 33, 1, labels) for seed in range(count)]
