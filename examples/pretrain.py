"""Trains a causal language model on packed documents, each row split over processes.

    python examples/pretrain.py fit --config configs/demo_cpu.yaml        # a small Llama on this machine's CPU
    python examples/pretrain.py fit --config configs/pretrain_8gpu.yaml   # 8B parameters from random weights
    python examples/pretrain.py fit --config configs/finetune_8gpu.yaml   # 8B parameters, chats
    python examples/pretrain.py fit --config configs/lora_8gpu.yaml       # the same with low-rank adapters

The module below knows nothing about the split. The strategy in the configuration does it.
"""

import logging
import warnings
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from stdlib_text import Batch
from torch import Tensor
from torch.optim import AdamW
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    get_cosine_schedule_with_warmup,
)
from transformers.integrations import HfDeepSpeedConfig

from lightning_ulysses.data import SequenceDataModule

if TYPE_CHECKING:
    from peft import PeftModel


class CausalLM(pl.LightningModule):
    """Next-token prediction with a causal language model of transformers.

    Args:
        llama: Settings of ``transformers.LlamaConfig`` for a model that starts from random weights.
        from_pretrained: Name or path of a pretrained model to start from instead.
        attn_implementation: Attention of transformers, ``"sdpa"`` or ``"flash_attention_2"``.
        lora: Settings of ``peft.LoraConfig``; only its adapters are trained then.
        gradient_checkpointing: Computes activations again in the backward pass instead of keeping them.
        learning_rate: Peak learning rate, reached after the warmup.
        weight_decay: Weight decay of AdamW.
        warmup_steps: Optimizer steps of linear warmup; a cosine to zero follows.
    """

    def __init__(
        self,
        llama: dict[str, Any] | None = None,
        from_pretrained: str | None = None,
        attn_implementation: str = "sdpa",
        lora: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        learning_rate: float = 1e-2,
        weight_decay: float = 0.1,
        warmup_steps: int = 10,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.llama = llama or {}
        self.from_pretrained = from_pretrained
        self.attn_implementation = attn_implementation
        self.lora = lora
        self.gradient_checkpointing = gradient_checkpointing
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.model: PreTrainedModel | PeftModel | None = None

    def configure_model(self) -> None:
        """Build the model. Under ZeRO-3 it is built in shards, and no process ever holds all of it."""
        if self.model is not None:
            return
        attention: dict[str, Any] = {"attn_implementation": self.attn_implementation}
        if self.from_pretrained is not None:
            strategy = self.trainer.strategy
            sharded = None
            if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
                # As long as this object lives, transformers shards every model that it loads or builds in this process.
                sharded = HfDeepSpeedConfig(strategy.config)
            self.model = AutoModelForCausalLM.from_pretrained(self.from_pretrained, **attention).train()
            del sharded
        else:
            self.model = LlamaForCausalLM(LlamaConfig(**self.llama, **attention))
        if self.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        if self.lora is not None:
            from peft import LoraConfig, get_peft_model

            self.model = get_peft_model(self.model, LoraConfig(task_type="CAUSAL_LM", **self.lora))

    def _loss(self, batch: Batch) -> Tensor:
        assert self.model is not None
        return self.model(**batch).loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss over the batch's targets."""
        return self._loss(batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss over the batch's targets."""
        return self._loss(batch)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with linear warmup and a cosine to zero."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = AdamW(trained, lr=self.learning_rate, weight_decay=self.weight_decay, betas=(0.9, 0.95))
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
    LightningCLI(CausalLM, SequenceDataModule, subclass_mode_data=True, auto_configure_optimizers=False)
