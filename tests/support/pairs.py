"""Tiny encoder-decoders, and batches with two sequences of their own lengths."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from guests import Guest
from models import VOCAB
from torch import Tensor, nn

_T5 = {
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_LONG = {"max_position_embeddings": 96}
FRAMES = 66
_SPEECH = {"num_mel_bins": 8, "max_source_positions": FRAMES // 2, "max_target_positions": 96}
_WRITTEN = ("LongT5",)
# For each prefix of a class its sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("T5", "MT5", "UMT5", "SwitchTransformers", *_WRITTEN), _T5),
    **dict.fromkeys(("Bart", "MBart", "PLBart", "BlenderbotSmall", "Pegasus", "M2M100", "Marian"), _BART | _LONG),
    "Whisper": {**_BART, **_SPEECH},
}


class Translator(L.LightningModule):
    """A user's module around an encoder-decoder of transformers."""

    def __init__(self, family: str, checkpointing: bool = False) -> None:
        super().__init__()
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(vocab_size=VOCAB, pad_token_id=0, **FAMILIES[family])
        kind = "MarianMTModel" if family == "Marian" else f"{family}ForConditionalGeneration"
        self.model: Any = getattr(transformers, kind)(config)
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TorchTranslator(L.LightningModule):
    """``nn.Transformer``, with the masks that its documentation shows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.place = nn.Embedding(VOCAB, 32), nn.Embedding(96, 32)
        self.model = nn.Transformer(32, 4, 2, 2, 48, 0.0, batch_first=True)
        self.head = nn.Linear(32, VOCAB)

    def embedded(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens) + self.place(torch.arange(tokens.shape[1]))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        given = F.pad(batch["labels"][:, :-1].clamp_min(0), (1, 0), value=1)
        hidden, length = batch["attention_mask"] == 0, given.shape[1]
        out = self.model(
            self.embedded(batch["input_ids"]),
            self.embedded(given),
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(length),
            tgt_is_causal=True,
            src_key_padding_mask=hidden,
            memory_key_padding_mask=hidden,
        )
        return F.cross_entropy(self.head(out).flatten(0, 1), batch["labels"].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Mixer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
        # (B, S, H * D) -> (B, S, H, D) -> (B, H, S, D)
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        # (B, S_k, 2 * H * D) -> (B, S_k, 2, H, D) -> 2 times (B, H, S_k, D)
        k, v = self.kv(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        # (B, H, S, D) -> (B, S, H, D) -> (B, S, H * D)
        return self.out(out.transpose(1, 2).flatten(2))


class Stage(nn.Module):
    def __init__(self, width: int, heads: int, has_memory: bool) -> None:
        super().__init__()
        self.attn, self.norm = Mixer(width, heads), nn.LayerNorm(width)
        self.cross = Mixer(width, heads) if has_memory else None
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))

    def forward(self, x: Tensor, memory: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        h = self.norm(x)
        x = x + self.attn(h, h, causal=memory is not None, mask=keep if memory is None else None)
        if self.cross is not None and memory is not None:
            x = x + self.cross(x, memory, mask=keep)
        return x + self.mlp(x)


class WrittenTranslator(TorchTranslator):
    """Written by hand, without a mask of the decoder's own and with head counts that do not divide by 2 or 4."""

    def __init__(self, heads: int = 5, frozen: bool = False) -> None:
        super().__init__()
        width = 8 * heads
        self.embed, self.place, self.head = nn.Embedding(VOCAB, width), nn.Embedding(96, width), nn.Linear(width, VOCAB)
        self.reader = nn.ModuleList([Stage(width, heads, has_memory=False) for _ in range(2)])
        self.model = nn.ModuleList([Stage(width, heads, has_memory=True) for _ in range(2)])
        if frozen:
            self.reader.requires_grad_(False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        # (B, S) -> (B, 1, 1, S)
        keep = batch["attention_mask"].bool()[:, None, None]
        memory = self.embedded(batch["input_ids"])
        for stage in self.reader:
            memory = stage(memory, keep=keep)
        x = self.embedded(F.pad(batch["labels"][:, :-1].clamp_min(0), (1, 0), value=1))
        for stage in self.model:
            x = stage(x, memory, keep)
        return F.cross_entropy(self.head(x).flatten(0, 1), batch["labels"].flatten())


def translator(family: str, **kwargs: Any) -> Any:
    """A picklable factory of `Translator`."""
    return partial(Translator, family, **kwargs)


def pair_of_texts(seed: int, source: int, target: int, rows: int = 2) -> dict[str, Tensor]:
    """A text with padding, and labels of another length with ignored ones at both ends."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB, (rows, source), generator=generator)
    labels = torch.randint(3, VOCAB, (rows, target), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, source - 3 - seed % 2 :] = 0
    labels[-1, target - 2 - seed % 3 :] = -100
    labels[0, : 2 * seed % 5] = -100
    return {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def speech(seed: int, target: int, rows: int = 2) -> dict[str, Tensor]:
    """Sound, (B, mel bins, frames), and its text."""
    generator = torch.Generator().manual_seed(seed)
    sound = torch.randn(rows, _SPEECH["num_mel_bins"], FRAMES, generator=generator)
    return {"input_features": sound, "labels": pair_of_texts(seed, 5, target, rows)["labels"]}


def count_labels(batch: dict[str, Tensor]) -> float:
    """Targets of a decoder, whose labels are not shifted."""
    return float((batch["labels"] != -100).sum())


TEXTS = [pair_of_texts(1, 29, 17), pair_of_texts(2, 33, 21)]
SPEECHES = [speech(1, 17), speech(2, 21)]
_BIASED = "relative positions as a bias"
PAIRS = [
    *(
        Guest(
            f"transformers `{family}`",
            translator(family),
            exact=family not in _WRITTEN,
            why="sequence tensors of different lengths"
            if family in _WRITTEN
            else "convolutions before the encoder"
            if family == "Whisper"
            else _BIASED * (sizes is _T5),
            batches=SPEECHES if family == "Whisper" else TEXTS,
            count=count_labels,
        )
        for family, sizes in FAMILIES.items()
    ),
    Guest("`nn.Transformer`", TorchTranslator, batches=TEXTS, count=count_labels),
    Guest("hand-written, 5 heads", WrittenTranslator, batches=TEXTS, count=count_labels),
]
