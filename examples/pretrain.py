"""Pretrains a small Llama on long documents, each split over processes.

    python examples/pretrain.py fit --config configs/demo_cpu.yaml

The module below knows nothing of that split: the strategy in the configuration does it.
"""

import logging
import warnings
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from stdlib_text import Batch, StdlibText
from torch import Tensor
from torch.optim import AdamW
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    get_cosine_schedule_with_warmup,
)


class CausalLM(pl.LightningModule):
    """Next-token prediction with a causal language model of transformers.

    Args:
        llama: Settings of ``transformers.LlamaConfig`` for a model that starts from random weights.
        from_pretrained: Name or path of a pretrained model to start from instead.
        learning_rate: Peak learning rate, reached after the warmup.
        weight_decay: Weight decay of AdamW.
        warmup_steps: Optimizer steps of linear warmup; a cosine to zero follows.
    """

    def __init__(
        self,
        llama: dict[str, Any] | None = None,
        from_pretrained: str | None = None,
        learning_rate: float = 1e-2,
        weight_decay: float = 0.1,
        warmup_steps: int = 10,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model: PreTrainedModel
        if from_pretrained is not None:
            self.model = AutoModelForCausalLM.from_pretrained(from_pretrained).train()
        else:
            self.model = LlamaForCausalLM(LlamaConfig(**(llama or {})))
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss over the batch's targets."""
        return self.model(**batch).loss

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss over the batch's targets."""
        return self.model(**batch).loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with linear warmup and a cosine to zero."""
        optimizer = AdamW(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay, betas=(0.9, 0.95))
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_cosine_schedule_with_warmup(optimizer, self.warmup_steps, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def hide_message(logger: str, text: str) -> None:
    """Drop a logger's messages that contain a text."""

    def keep(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    logging.getLogger(logger).addFilter(keep)


def hide_noise() -> None:
    """Hide messages that say nothing about this program: deprecations inside libraries, advertisements, guesses."""
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r".*recommended to use `self.log\('validate/loss'")
    hide_message("lightning.pytorch.utilities.rank_zero", "litlogger")
    hide_message("DeepSpeed", "Setting accelerator to CPU")


if __name__ == "__main__":
    hide_noise()
    LightningCLI(CausalLM, StdlibText, auto_configure_optimizers=False)
