"""Training recipes: a model, a step and a batch each, and where the step is split.

python tests/support/recipes.py    # writes docs/steps.md
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import recipe_models
import recipe_steps
import torch
from models import VOCAB, count_targets
from recipe_batches import (
    classes_of_rows,
    images,
    judged,
    latents,
    masked,
    one_tensor,
    only_tokens,
    packed,
    padded_series,
    patches,
    prompted,
    sampled,
    scored,
    series,
    spans,
    unpadded,
    weighted_series,
)
from torch import Tensor

PAGE = Path(__file__).parents[2] / "docs" / "steps.md"


class Trained(L.LightningModule):
    """A model with a step; the base of all recipes."""

    def __init__(self, loss: str, model: str, **kwargs: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loss = loss
        self.model: Any = getattr(recipe_models, model)(**kwargs)
        # Another model whose parameters are not trained: a reference, or a teacher.
        self.other: Any = None
        if loss in ("dpo_with_reference", "distillation"):
            torch.manual_seed(1)
            self.other = getattr(recipe_models, model)(**kwargs).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return getattr(recipe_steps, self.loss)(self, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


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
    """The text of docs/steps.md."""
    head = (
        "# Training steps\n\n"
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
