"""Steps of the training recipes: they know nothing of slices."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from recipe_batches import ROWS
from torch import Tensor


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
