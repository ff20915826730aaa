"""Models in which tokens meet outside of attention: in convolutions, recurrences, sums along the sequence."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from models import VOCAB, Block, HandWritten
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_ulysses


class Layered(HandWritten):
    """A hand-written model with one more layer in each block, of a kind of its own."""

    def __init__(self, make: Any, attends: bool = True, checkpoints: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(2)
        width = self.embed.embedding_dim
        self.blocks = nn.ModuleList(Layer(make(width), width, attends) for _ in range(2))
        self.checkpoints, self.dropout = checkpoints, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.embed(x) + self.place(lightning_ulysses.sequence_positions(x)))
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=False) if self.checkpoints else block(h)
        return self.head(h)


class Layer(nn.Module):
    def __init__(self, mixer: nn.Module, width: int, attends: bool) -> None:
        super().__init__()
        self.mixer = mixer
        self.rest: nn.Module = (
            Block(width, 4, 4, "causal")
            if attends
            else nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        )

    def forward(self, h: Tensor) -> Tensor:
        return self.rest(h + self.mixer(h))


class CausalConv(nn.Module):
    """Depthwise, padded on both sides and cut, as in state-space models."""

    def __init__(self, width: int, kernel: int = 4, dilation: int = 1) -> None:
        super().__init__()
        reach = dilation * (kernel - 1)
        self.conv = nn.Conv1d(width, width, kernel, padding=reach, dilation=dilation, groups=width)

    def forward(self, h: Tensor) -> Tensor:
        return F.silu(self.conv(h.transpose(1, 2))[..., : h.shape[1]]).transpose(1, 2)


class PaddedConv(nn.Module):
    """Padded by the caller: before, on both sides, or behind."""

    def __init__(self, width: int, before: int, after: int, kernel: int = 5) -> None:
        super().__init__()
        self.pad, self.conv = (before, after), nn.Conv1d(width, width, kernel, groups=2)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(F.pad(h.transpose(1, 2), self.pad)).transpose(1, 2)


class Centred(nn.Module):
    """A convolution, a pooling and a convolution over two dimensions, one after the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 5, padding="same", groups=4, dilation=2)
        self.pool, self.mean = nn.MaxPool1d(3, 1, 1), nn.AvgPool1d(3, 1, 1, count_include_pad=False)
        self.plane = nn.Conv2d(1, 2, 3, padding=1, stride=(1, 2))

    def forward(self, h: Tensor) -> Tensor:
        h = self.mean(self.pool(self.conv(h.transpose(1, 2)))).transpose(1, 2)
        # (B, S, W) -> (B, 1, S, W) -> (B, 2, S, W / 2) -> (B, S, W)
        return self.plane(h[:, None]).transpose(1, 2).flatten(2)


class Mirrored(nn.Module):
    """A convolution of a tensor that is not padded by zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(F.pad(h.transpose(1, 2), (1, 1), mode="reflect")).transpose(1, 2)


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(h.transpose(1, 2)).transpose(1, 2)


class Recurrent(nn.Module):
    def __init__(self, width: int, kind: Any = nn.GRU) -> None:
        super().__init__()
        self.cells = kind(width, width, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        return self.cells(h)[0]


class Means(nn.Module):
    """A cumulative mean, and an exponential one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.decay, self.out = nn.Parameter(torch.zeros(width)), nn.Linear(2 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        count, kept = torch.arange(1, h.shape[1] + 1, device=h.device)[:, None], self.decay.sigmoid()
        state, found = torch.zeros_like(h[:, 0]), []
        for token in h.unbind(1):
            state = kept * state + (1 - kept) * token
            found.append(state)
        return self.out(torch.cat([h.cumsum(1) / count, torch.stack(found, 1)], dim=-1))


class Shifted(nn.Module):
    """RWKV's token shift, by a pad and by a roll, in front of a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift, self.mix = nn.ZeroPad2d((0, 0, 1, -1)), nn.Parameter(torch.full((width,), 0.3))
        self.key = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return self.key(h + self.mix * (self.shift(h) - h.roll(2, 1)))


class Fourier(nn.Module):
    """FNet's mixing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(torch.fft.fft2(h.float()).real)


class Gate(nn.Module):
    """Squeezes all tokens into one gate for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, 8), nn.Linear(8, width)

    def forward(self, h: Tensor) -> Tensor:
        return h * self.up(F.relu(self.down(h.mean(1)))).sigmoid()[:, None]


class ByHand(nn.Module):
    """minGPT's attention, with dropout."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.drop = nn.Linear(width, 3 * width), nn.Dropout(dropout)
        self.register_buffer("bias", torch.ones(64, 64).tril()[None, None])

    def forward(self, h: Tensor) -> Tensor:
        length = h.shape[1]
        # (B, S, W) -> (B, S, 4, D) -> (B, 4, S, D)
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, dim=-1))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, -math.inf)
        return (self.drop(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)


class Turn(nn.Module):
    """Rotates queries and keys by places that it counts."""

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        angle = torch.arange(q.shape[-2], device=q.device)[:, None] / 7
        return q * angle.cos() + q.flip(-1) * angle.sin(), k * angle.cos() + k.flip(-1) * angle.sin()


class Rotated(nn.Module):
    """Attention around a submodule that counts places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.rotary = nn.Linear(width, 3 * width), Turn()

    def forward(self, h: Tensor) -> Tensor:
        # (B, S, W) -> (B, S, 4, D) -> (B, 4, S, D)
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, dim=-1))
        q, k = self.rotary(q, k=k)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class TokenMixing(nn.Module):
    """MLP-Mixer's: weights for each place of sequences of one length."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.mix = nn.Linear(length, length)

    def forward(self, h: Tensor) -> Tensor:
        return self.mix(h.transpose(1, 2)).transpose(1, 2)


def layered(make: Any, **settings: Any) -> Any:
    """A picklable factory of `Layered`."""
    return partial(Layered, make, **settings)


class Pretrained(HandWritten):
    """A causal language model of transformers."""

    def __init__(self, family: str, **sizes: Any) -> None:
        super().__init__()
        import transformers

        torch.manual_seed(0)
        self.embed = self.place = self.blocks = self.head = None
        config = getattr(transformers, f"{family}Config")(vocab_size=VOCAB, **sizes)
        self.model: Any = getattr(transformers, f"{family}ForCausalLM")(config)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(**batch).loss
