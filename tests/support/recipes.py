"""Training recipes as people write them for one process: steps that know nothing of slices.

python tests/support/recipes.py    # writes docs/recipes.md
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from models import VOCAB, Block, count_targets
from torch import Tensor, nn

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
ROWS, LENGTH = 4, 37


class Trained(L.LightningModule):
    """A model with a step; the base of all recipes."""

    def __init__(self, loss: str, model: str, **kwargs: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loss = loss
        self.model: Any = globals()[model](**kwargs)
        # Another model whose parameters are not trained: a reference, or a teacher.
        self.other: Any = None
        if loss in ("dpo_with_reference", "distillation"):
            torch.manual_seed(1)
            self.other = globals()[model](**kwargs).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return globals()[self.loss](self, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


# Models


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


# Steps


def of_the_model(module: Any, batch: Any) -> Tensor:
    return module.model(**batch).loss


def next_token(module: Any, batch: Any) -> Tensor:
    """One tensor (B, S + 1), shifted in the step."""
    tokens = batch["tokens"] if isinstance(batch, dict) else batch
    return F.cross_entropy(module.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def shifted_in_the_step(module: Any, batch: Any) -> Tensor:
    logits = module.model(input_ids=batch["input_ids"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def sums(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Log-probabilities of rows, and how many tokens each has."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    y = batch["labels"][:, 1:]
    each = logits.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0] * (y != -100)
    return each.sum(1), (y != -100).sum(1)


def dpo(module: Any, batch: Any) -> Tensor:
    total, _ = sums(module.model, batch)
    return -F.logsigmoid(0.1 * (total[: ROWS // 2] - total[ROWS // 2 :])).mean()


def dpo_with_reference(module: Any, batch: Any) -> Tensor:
    total, _ = sums(module.model, batch)
    with torch.no_grad():
        reference, _ = sums(module.other, batch)
    total = total - reference
    return -F.logsigmoid(0.1 * (total[: ROWS // 2] - total[ROWS // 2 :])).mean()


def kto(module: Any, batch: Any) -> Tensor:
    total, _ = sums(module.model, batch)
    baseline = total.detach().mean().clamp(max=0)
    return torch.where(
        batch["good"], 1 - (0.1 * (total - baseline)).sigmoid(), (0.1 * (total - baseline)).sigmoid()
    ).mean()


def orpo(module: Any, batch: Any) -> Tensor:
    total, count = sums(module.model, batch)
    mean = total / count
    good, bad = mean[: ROWS // 2], mean[ROWS // 2 :]
    odds = good - bad - (torch.log1p(-good.exp()) - torch.log1p(-bad.exp()))
    return (-good - 0.1 * F.logsigmoid(odds)).mean()


def simpo(module: Any, batch: Any) -> Tensor:
    total, count = sums(module.model, batch)
    mean = 2.0 * total / count
    return -F.logsigmoid(mean[: ROWS // 2] - mean[ROWS // 2 :] - 0.5).mean()


def reward(module: Any, batch: Any) -> Tensor:
    scores = module.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    return -F.logsigmoid(scores[: ROWS // 2] - scores[ROWS // 2 :]).mean()


def grpo(module: Any, batch: Any) -> Tensor:
    """The clipped ratio, a mean over the tokens of each completion, then over completions."""
    logits = module.model(input_ids=batch["input_ids"]).logits[:, :-1]
    each = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    ratio = (each - batch["old"][:, 1:]).exp()
    gain = torch.minimum(ratio * batch["advantage"][:, None], ratio.clamp(0.8, 1.2) * batch["advantage"][:, None])
    mask = batch["completion_mask"][:, 1:]
    return -((gain * mask).sum(1) / mask.sum(1)).mean()


def several_ahead(module: Any, batch: Any) -> Tensor:
    logits, x = module.model(batch["input_ids"]), batch["input_ids"]
    losses = [F.cross_entropy(logits[:, :-n].flatten(0, 1), x[:, n:].flatten()) for n in (1, 2, 3)]
    return losses[0] + 0.3 * losses[1] + 0.1 * losses[2]


def with_z_loss(module: Any, batch: Any) -> Tensor:
    logits = module.model(batch["input_ids"])
    y = batch["labels"]
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()) + 0.01 * logits.logsumexp(-1).pow(2).mean()


def distillation(module: Any, batch: Any) -> Tensor:
    wanted, given = (model(input_ids=batch["input_ids"]).logits for model in (module.other, module.model))
    each = F.kl_div(given.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    kept = batch["labels"] != -100
    return (each * kept).sum() / kept.sum()


def masked_tokens(module: Any, batch: Any) -> Tensor:
    """BERT's task, masked in the step."""
    x = batch["input_ids"]
    hidden = torch.rand(x.shape, generator=torch.Generator().manual_seed(5)) < 0.3
    return F.cross_entropy(module.model(x.masked_fill(hidden, 0))[hidden], x[hidden])


def masked_diffusion(module: Any, batch: Any) -> Tensor:
    """LLaDA's loss: a masking rate for each row, whose inverse weights its tokens."""
    x, generator = batch["input_ids"], torch.Generator().manual_seed(6)
    rate = torch.rand(len(x), 1, generator=generator) * 0.8 + 0.1
    hidden = torch.rand(x.shape, generator=generator) < rate
    each = F.cross_entropy(module.model(x.masked_fill(hidden, 0)).transpose(1, 2), x, reduction="none")
    return (each * hidden / rate).sum() / x.numel()


def contrastive(module: Any, batch: Any) -> Tensor:
    """Embeddings by mean pooling; a row's partner is in the other half of the batch."""
    mask = batch["attention_mask"][..., None]
    hidden = module.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    pooled = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    scores = pooled[: ROWS // 2] @ pooled[ROWS // 2 :].T / 0.1
    return F.cross_entropy(scores, torch.arange(ROWS // 2))


def regression(module: Any, batch: Any) -> Tensor:
    return F.mse_loss(module.model(batch["input_ids"]).mean((1, 2)), batch["wanted"])


def forecast(module: Any, batch: Any) -> Tensor:
    x = batch["series"]
    return F.mse_loss(module.model(x[:, :-1]), x[:, 1:])


def padded_classes(module: Any, batch: Any) -> Tensor:
    padded = batch["padded"]
    hidden = module.model(batch["series"], padded).masked_fill(padded[..., None], 0.0)
    return F.cross_entropy(hidden.sum(1) / (~padded).sum(1, keepdim=True), batch["classes"])


def weighted_regression(module: Any, batch: Any) -> Tensor:
    error = (module.model(batch["series"]) - batch["series"].roll(1, 1)).pow(2).mean(-1)
    return (error * batch["weight"]).sum() / batch["weight"].sum()


def classified(module: Any, batch: Any) -> Tensor:
    images, classes = batch
    return F.cross_entropy(module.model(images), classes)


def autoencoded(module: Any, batch: Any) -> Tensor:
    wanted = batch["series"]
    found, hidden = module.model(wanted)
    return (found - wanted).pow(2).mean(-1)[hidden].mean()


def denoised(module: Any, batch: Any) -> Tensor:
    x, generator = batch["latents"], torch.Generator().manual_seed(7)
    noise, time = torch.randn(x.shape, generator=generator), torch.rand(len(x), generator=generator)
    mixed = x + time[:, None, None] * (noise - x)
    return F.mse_loss(module.model(mixed, time), noise - x)


# Batches


def tokens(seed: int, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCAB, (ROWS, length), generator=torch.Generator().manual_seed(seed))


def prompted(seed: int) -> dict[str, Tensor]:
    """A prompt of another length in each row, and padding after some of them."""
    x = tokens(seed)
    y, mask = x.clone(), torch.ones_like(x)
    for row in range(ROWS):
        y[row, : 2 + (5 * row + seed) % 11] = -100
        if row % 2:
            end = LENGTH - 3 - (row + seed) % 5
            x[row, end:], y[row, end:], mask[row, end:] = 0, -100, 0
    return {"input_ids": x, "labels": y, "attention_mask": mask}


def unpadded(seed: int) -> dict[str, Tensor]:
    batch = prompted(seed)
    return {"input_ids": tokens(seed), "labels": batch["labels"]}


def packed(seed: int) -> dict[str, Tensor]:
    place = torch.cat([torch.arange(14), torch.arange(LENGTH - 14)])[None].expand(ROWS, -1)
    batch = unpadded(seed)
    # No token is the target of the last one of another document.
    batch["labels"][:, [0, 14]] = -100
    return {**batch, "position_ids": place.clone()}


def classes_of_rows(seed: int) -> dict[str, Tensor]:
    batch = prompted(seed)
    return {**batch, "labels": torch.tensor([0, 1, 1, 0])}


def spans(seed: int) -> dict[str, Tensor]:
    batch = prompted(seed)
    del batch["labels"]
    return {**batch, "start_positions": torch.tensor([3, 9, 22, 17]), "end_positions": torch.tensor([5, 31, 30, 20])}


def judged(seed: int) -> dict[str, Tensor]:
    return {**prompted(seed), "good": torch.tensor([True, False, False, True])}


def sampled(seed: int) -> dict[str, Tensor]:
    batch, generator = prompted(seed), torch.Generator().manual_seed(seed)
    return {
        "input_ids": batch["input_ids"],
        "completion_mask": (batch["labels"] != -100).float(),
        "old": -4 + 0.1 * torch.randn(ROWS, LENGTH, generator=generator),
        "advantage": torch.randn(ROWS, generator=generator),
    }


def only_tokens(seed: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(seed)}


def scored(seed: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(seed), "wanted": torch.linspace(-1, 1, ROWS) + seed}


def one_tensor(seed: int) -> Tensor:
    return tokens(seed, LENGTH + 1)


def masked(seed: int) -> dict[str, Tensor]:
    x, y = tokens(seed), tokens(seed)
    hidden = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.2 + 0.1 * seed
    return {"input_ids": x.masked_fill(hidden, 1), "labels": y.masked_fill(~hidden, -100)}


def series(seed: int) -> dict[str, Tensor]:
    return {"series": torch.randn(ROWS, LENGTH, 5, generator=torch.Generator().manual_seed(seed))}


def padded_series(seed: int) -> dict[str, Tensor]:
    padded = torch.arange(LENGTH) >= torch.tensor([LENGTH, 20, 31, 12])[:, None]
    return {**series(seed), "padded": padded, "classes": torch.tensor([0, 3, 1, 4])}


def weighted_series(seed: int) -> dict[str, Tensor]:
    weight = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(seed + 10))
    return {**series(seed), "weight": weight}


def patches(seed: int) -> dict[str, Tensor]:
    return {"series": torch.randn(ROWS, LENGTH, 6, generator=torch.Generator().manual_seed(seed))}


def latents(seed: int) -> dict[str, Tensor]:
    return {"latents": patches(seed)["series"]}


def images(seed: int) -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, 3, 20, 20, generator=torch.Generator().manual_seed(seed)), torch.tensor([1, 5, 0, 2])


def one(batch: Any) -> float:
    return 1.0


@dataclass(frozen=True)
class Recipe:
    """A way to train.

    Attributes:
        title: For the page.
        make: Makes the module.
        batch: Makes a batch from a seed.
        split: Where the strategy should split the sequence.
        count: Weights micro-batches and groups: the number of targets if the loss is a mean over them, else 1.
        strategy: Arguments of the strategy.
    """

    title: str
    make: Callable[[], L.LightningModule]
    batch: Callable[[int], Any]
    split: str
    count: Callable[[Any], float] = one
    strategy: dict[str, Any] = field(default_factory=dict)


def _make(loss: str, model: str, **kwargs: Any) -> Any:
    return partial(Trained, loss, model, **kwargs)


def valid(batch: Any) -> float:
    return float((batch["labels"] != -100).sum())


def shifted(batch: Any) -> float:
    return float((batch["labels"][:, 1:] != -100).sum())


def kept(batch: Any) -> float:
    return float(batch["weight"].sum())


RECIPES = {
    "pretraining": Recipe(
        "Pretraining, transformers", _make("of_the_model", "llama"), unpadded, "batch", count_targets
    ),
    "padded": Recipe("Fine-tuning on padded rows", _make("of_the_model", "llama"), prompted, "batch", count_targets),
    "packed": Recipe("Fine-tuning on packed rows", _make("of_the_model", "llama"), packed, "batch", count_targets),
    "shifted": Recipe("Labels shifted in the step", _make("shifted_in_the_step", "llama"), unpadded, "blocks", shifted),
    "nanogpt": Recipe("nanoGPT: one tensor (B, S + 1)", _make("next_token", "GPT"), one_tensor, "blocks"),
    "dpo": Recipe("DPO", _make("dpo", "llama"), prompted, "blocks"),
    "dpo_reference": Recipe("DPO with a reference model", _make("dpo_with_reference", "llama"), prompted, "blocks"),
    "kto": Recipe("KTO", _make("kto", "llama"), judged, "blocks"),
    "orpo": Recipe("ORPO", _make("orpo", "llama"), prompted, "blocks"),
    "simpo": Recipe("SimPO", _make("simpo", "llama"), prompted, "blocks"),
    "reward": Recipe(
        "Reward model", _make("reward", "llama", head="ForSequenceClassification", num_labels=1), prompted, "blocks"
    ),
    "grpo": Recipe(
        "GRPO",
        _make("grpo", "llama"),
        sampled,
        "blocks",
        strategy={"sequence_dims": {"input_ids": 1, "completion_mask": 1, "old": 1}},
    ),
    "several_ahead": Recipe("Multi-token prediction", _make("several_ahead", "GPT"), only_tokens, "blocks"),
    "z_loss": Recipe("Cross entropy and z-loss over all tokens", _make("with_z_loss", "GPT"), unpadded, "blocks"),
    "distillation": Recipe("Distillation", _make("distillation", "llama"), unpadded, "batch", valid),
    "rows": Recipe(
        "Classification of rows, transformers",
        _make("of_the_model", "llama", head="ForSequenceClassification"),
        classes_of_rows,
        "blocks",
    ),
    "tokens": Recipe(
        "Classification of tokens, transformers",
        _make("of_the_model", "bert", head="ForTokenClassification", num_labels=VOCAB),
        unpadded,
        "batch",
        valid,
    ),
    "spans": Recipe(
        "Question answering, transformers", _make("of_the_model", "bert", head="ForQuestionAnswering"), spans, "blocks"
    ),
    "mlm": Recipe(
        "Masked language model, BERT", _make("of_the_model", "bert", head="ForMaskedLM"), masked, "batch", valid
    ),
    "masked_in_step": Recipe(
        "Masked language model, masked in the step", _make("masked_tokens", "GPT", causal=False), only_tokens, "blocks"
    ),
    "masked_diffusion": Recipe(
        "Masked diffusion of tokens", _make("masked_diffusion", "GPT", causal=False), only_tokens, "blocks"
    ),
    "contrastive": Recipe("Contrastive embeddings", _make("contrastive", "llama", head="Model"), prompted, "blocks"),
    "regression": Recipe("A property of the whole sequence", _make("regression", "GPT"), scored, "blocks"),
    "forecast": Recipe(
        "Time series: the next step",
        _make("forecast", "Encoder", causal=True),
        series,
        "blocks",
        strategy={"sequence_dims": {"series": 1}},
    ),
    "padded_classes": Recipe(
        "Time series: classes of padded rows",
        _make("padded_classes", "Encoder"),
        padded_series,
        "blocks",
        strategy={"sequence_dims": {"series": 1, "padded": 1}},
    ),
    "weighted": Recipe(
        "Regression with a weight for each token",
        _make("weighted_regression", "Encoder"),
        weighted_series,
        "blocks",
        kept,
        strategy={"sequence_dims": {"series": 1, "weight": 1}},
    ),
    "vision": Recipe("ViT: classes of images", _make("classified", "Vision"), images, "blocks"),
    "autoencoder": Recipe(
        "Masked autoencoder, two stacks",
        _make("autoencoded", "MaskedAutoencoder"),
        patches,
        "blocks",
        strategy={"sequence_dims": {"series": 1}},
    ),
    "diffusion": Recipe(
        "Diffusion with noise of the step",
        _make("denoised", "Denoiser"),
        latents,
        "blocks",
        strategy={"sequence_dims": {"latents": 1}},
    ),
}


def table() -> str:
    """The text of docs/recipes.md."""
    head = (
        "# Training recipes\n\n"
        "Steps as they are written for one process, with the default settings: one optimizer step of two micro-\n"
        "batches on two processes against one, in float32. Each is exact: the step, the loss and the gradient norm\n"
        "differ by at most 1e-5. `tests/parity/test_recipes.py` runs every row; `python tests/support/recipes.py`\n"
        "writes this file.\n\n"
        "Split in the batch, each process computes its slice of everything. Split in the blocks, the repeated blocks\n"
        "of the model are divided, each process computes what comes before them on the whole sequence, and what comes\n"
        "after stays divided.\n\n"
        "| Recipe | Split in | Micro-batches weighted by |\n| --- | --- | --- |\n"
    )
    rows = (
        f"| {recipe.title} | {'the batch' if recipe.split == 'batch' else 'the blocks'} "
        f"| {'nothing' if recipe.count is one else 'their targets'} |\n"
        for recipe in RECIPES.values()
    )
    return head + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(table())
