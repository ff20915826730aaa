"""Models of the training recipes, as people write them for one process."""

from __future__ import annotations

from typing import Any

import torch
from models import VOCAB, Block
from torch import Tensor, nn


def llama(head: str = "ForCausalLM", **kwargs: Any) -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
        pad_token_id=0,
        **kwargs,
    )
    return getattr(transformers, f"Llama{head}")(config)


def bert(head: str, **kwargs: Any) -> Any:
    import transformers

    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **kwargs,
    )
    return getattr(transformers, f"Bert{head}")(config)


class GPT(nn.Module):
    """Shaped like nanoGPT: positions by ``torch.arange`` inside."""

    def __init__(self, causal: bool = True, vocabulary: int = VOCAB) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, 32), nn.Embedding(64, 32)
        self.blocks = nn.ModuleList([Block(32, 4, 4, "causal" if causal else "full") for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x) + self.place(torch.arange(x.shape[1]))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` over features (B, S, F), with sines as positions."""

    def __init__(self, features: int = 5, outputs: int = 5, causal: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
        self.first, self.last = nn.Linear(features, 32), nn.Linear(32, outputs)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.causal = causal

    def forward(self, x: Tensor, padded: Tensor | None = None) -> Tensor:
        S = x.shape[1]
        place = (torch.arange(S)[:, None] * 10000 ** (-torch.arange(32) / 32)).sin()
        mask = nn.Transformer.generate_square_subsequent_mask(S) if self.causal else None
        hidden = self.encoder(self.first(x) + place, mask=mask, src_key_padding_mask=padded, is_causal=self.causal)
        return self.last(hidden)


class Vision(nn.Module):
    """Shaped like a ViT: patches and a class token inside."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, stride=4)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(1, 26, 32))
        self.blocks = nn.Sequential(*[Block(32, 4, 4, "full") for _ in range(2)])
        self.head = nn.Linear(32, 7)

    def forward(self, images: Tensor) -> Tensor:
        # (B, 3, 20, 20) -> (B, 32, 5, 5) -> (B, 25, 32)
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.place
        return self.head(self.blocks(x)[:, 0])


class MaskedAutoencoder(nn.Module):
    """An encoder of the patches that are seen, and a decoder of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 32), nn.Linear(32, 6)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(1, 64, 32))
        self.encoder = nn.ModuleList([Block(32, 4, 4, "full") for _ in range(2)])
        self.decoder = nn.ModuleList([Block(32, 2, 2, "full") for _ in range(2)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        B, S, _ = x.shape
        order = torch.rand(B, S, generator=torch.Generator().manual_seed(0)).argsort(1)
        seen, back = order[:, : S // 3], order.argsort(1)
        hidden = self.first(x) + self.place[:, :S]
        hidden = hidden.gather(1, seen[..., None].expand(-1, -1, 32))
        for block in self.encoder:
            hidden = block(hidden)
        hidden = torch.cat([hidden, self.token.expand(B, S - hidden.shape[1], -1)], dim=1)
        hidden = hidden.gather(1, back[..., None].expand(-1, -1, 32)) + self.place[:, :S]
        for block in self.decoder:
            hidden = block(hidden)
        return self.last(hidden), back >= S // 3


class Modulated(nn.Module):
    """A block of a DiT: its norms are scaled by the condition of the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.scale = Block(32, 4, 4, "full"), nn.Linear(32, 32)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.block(x * (1 + self.scale(condition)[:, None]))


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.time = nn.Linear(6, 32), nn.Linear(32, 6), nn.Linear(1, 32)
        self.place = nn.Parameter(torch.randn(1, 64, 32))
        self.blocks = nn.ModuleList([Modulated() for _ in range(2)])

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden, condition = self.first(x) + self.place[:, : x.shape[1]], self.time(time[:, None])
        for block in self.blocks:
            hidden = block(hidden, condition)
        return self.last(hidden)
