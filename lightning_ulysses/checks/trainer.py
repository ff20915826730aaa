"""Checks of the Trainer's and the module's settings before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from inspect import signature
from typing import TYPE_CHECKING, Any

import lightning.fabric.accelerators as fabric_accelerators
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.callbacks import LearningRateFinder, ModelPruning, WeightAveraging
from lightning.pytorch.plugins import DeepSpeedPrecision
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch._dynamo import OptimizedModule

from lightning_ulysses.errors import UlyssesError, UlyssesValueError

if TYPE_CHECKING:
    import lightning.pytorch as pl


# Of the Trainer and of Fabric.
_ACCELERATORS = (
    *(CUDAAccelerator, CPUAccelerator),
    *(fabric_accelerators.CUDAAccelerator, fabric_accelerators.CPUAccelerator),
)


def check_accelerator(accelerator: object) -> None:
    """Refuses devices other than GPUs of CUDA and CPUs.

    Raises:
        UlyssesError: With the class of the accelerator.
    """
    if not isinstance(accelerator, _ACCELERATORS):
        raise UlyssesError(f"accelerator {type(accelerator).__name__}", "CUDA or CPU", "set accelerator='cpu'")


def check_trainer(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuses settings that DeepSpeed or a split sequence does not support.

    Raises:
        UlyssesError: With the name of the setting.
    """
    # An enum or a string, depending on how the Trainer was given it.
    if str(getattr(trainer.gradient_clip_algorithm, "value", trainer.gradient_clip_algorithm)) == "value":
        raise UlyssesError(
            "gradient_clip_algorithm='value'",
            "clipping by norm, the only kind that DeepSpeed does",
            "set Trainer(gradient_clip_algorithm='norm')",
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise UlyssesError(
            f"{type(module).__name__}.training_step(dataloader_iter)",
            "training_step(batch, batch_idx), whose batch can be cut before it reaches the module",
            "take the batch instead of the iterator",
        )
    _check_precision(trainer)
    _check_activation_checkpointing(getattr(trainer.strategy, "config", None) or {})
    is_partitioned = bool(getattr(trainer.strategy, "zero_stage_3", False))
    _check_callbacks(trainer, is_partitioned)
    if is_partitioned:
        _check_compiled(module)


def _check_callbacks(trainer: pl.Trainer, is_partitioned: bool) -> None:
    for callback in getattr(trainer, "callbacks", ()):
        name = type(callback).__name__
        if isinstance(callback, WeightAveraging) and is_partitioned:
            raise UlyssesError(
                f"{name} with ZeRO stage 3",
                "stage 1 or 2, where every rank holds the whole weights that it averages",
                "set stage=2 in the strategy, or drop the callback",
            )
        if isinstance(callback, ModelPruning):
            raise UlyssesError(
                name,
                "parameters that stay in the modules in which the run began: ZeRO steps and gathers those",
                "prune the weights after training, or before it in configure_model",
            )
        if isinstance(callback, LearningRateFinder):
            raise UlyssesError(
                f"{name}, which Tuner.lr_find uses as well",
                "an optimizer that a scheduler of the finder can take over, which that of DeepSpeed is not",
                "find the rate with a small model on one process without this strategy, or compare a few short runs",
            )


def _check_compiled(module: pl.LightningModule) -> None:
    for name, part in module.named_modules():
        if isinstance(part, OptimizedModule):
            raise UlyssesError(
                f"self.{name} = torch.compile(...) with ZeRO stage 3",
                "modules that own their parameters, which DeepSpeed replaces; this wrapper only passes them on",
                f"compile in place, self.{name.replace('._orig_mod', '')}.compile(), or use stage 2",
            )


def _check_activation_checkpointing(config: dict[str, Any]) -> None:
    settings = config.get("activation_checkpointing") or {}
    if settings.get("contiguous_memory_optimization"):
        raise UlyssesError(
            "contiguous_memory_optimization of DeepSpeed's activation checkpointing",
            "no buffers that are laid out once for activations of one size and number, which Lightning cannot tell",
            "leave contiguous_memory_optimization out",
        )
    from deepspeed.runtime.activation_checkpointing import checkpointing

    # mp_size != 1 means that an mpu was configured: DeepSpeed would partition activations over its ranks.
    if settings.get("partition_activations") and checkpointing.mp_size != 1:
        raise UlyssesError(
            f"partition_activations over {checkpointing.mp_size} model-parallel ranks",
            "activations that are whole on each rank: those of other ranks belong to other tokens",
            "leave partition_activations out, or give deepspeed.checkpointing.configure no mpu",
        )


def _check_precision(trainer: pl.Trainer) -> None:
    plugin = trainer.precision_plugin
    if not isinstance(plugin, DeepSpeedPrecision):
        raise UlyssesError(
            f"plugins=[{type(plugin).__name__}(...)]",
            "the precision plugin of DeepSpeed, whose engine runs backward and step",
            "leave it out of plugins, and set Trainer(precision=...), such as 'bf16-mixed' or '32-true'",
        )
    check_precision(str(trainer.precision), "Trainer")


def check_precision(precision: str, owner: str) -> None:
    """Refuses a precision that DeepSpeed does not compute in on this device.

    Args:
        precision: As Lightning calls it.
        owner: The class that was given it.

    Raises:
        UlyssesError: With the ones that it can.
    """
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed's view of the device counts, which may differ from torch's: it denies most CPUs float16.
    device = get_accelerator()
    supported = {"16": bool(device.is_fp16_supported()), "bf16": bool(device.is_bf16_supported())}
    if not supported.get(precision.split("-")[0], True):
        others = [f"{kind}-mixed" for kind, good in supported.items() if good]
        raise UlyssesError(
            f"precision={precision!r} on a {device.device_name()} device that cannot compute in it",
            f"one of {[*others, '32-true']}",
            f"set {owner}(precision={[*others, '32-true'][0]!r})",
        )


def check_loss(module: pl.LightningModule, output: Any) -> None:
    """Refuses what a training step returned if it is no loss that can be differentiated.

    Raises:
        UlyssesError: For None, since the targets of its batch have been counted already, and for a constant.
    """
    step = f"{type(module).__name__}.training_step"
    if output is None:
        raise UlyssesError(
            f"None from {step}",
            "a loss for every batch, since a step's targets are counted ahead over all micro-batches and ranks",
            "leave unwanted batches out in the dataset, or give their labels the ignore_index",
        )
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if isinstance(loss, Tensor) and loss.grad_fn is None:
        raise UlyssesError(
            f"a loss from {step} that depends on no parameter",
            "a loss that can be differentiated",
            "leave detach(), item(), float() and torch.no_grad() out of its computation",
        )


def check_arguments(given: Iterable[str], strategy: type) -> None:
    """Refuses arguments that neither the strategy nor the class it derives from has.

    Raises:
        UlyssesValueError: For the first one.
    """
    makers = [vars(each)["__init__"] for each in strategy.__mro__[:-1] if "__init__" in vars(each)]
    known = {name for maker in makers for name in signature(maker).parameters}
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise UlyssesValueError(
                f"the argument {name!r}",
                f"arguments of {strategy.__name__} and of Lightning's DeepSpeedStrategy",
                f"write {near[0]!r}" if near else "leave it out",
            )
