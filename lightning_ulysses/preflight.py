"""Checks before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch._dynamo import OptimizedModule

from lightning_ulysses.batch import WholeBatch
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.mesh import SequenceMesh
from lightning_ulysses.state import SequenceState

if TYPE_CHECKING:
    import lightning.pytorch as pl


def check_trainer(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuses what the Trainer or the module asks for and DeepSpeed or a split sequence cannot do.

    Raises:
        UlyssesError: Naming the setting.
    """
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
    if getattr(trainer.strategy, "zero_stage_3", False):
        _check_compiled(module)


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

    if settings.get("partition_activations") and checkpointing.mp_size != 1:
        raise UlyssesError(
            f"partition_activations over {checkpointing.mp_size} model-parallel ranks",
            "activations that are whole on each rank: those of other ranks belong to other tokens",
            "leave partition_activations out, or give deepspeed.checkpointing.configure no mpu",
        )


def _check_precision(trainer: pl.Trainer) -> None:
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    supported = {"16": bool(device.is_fp16_supported()), "bf16": bool(device.is_bf16_supported())}
    if not supported.get(str(trainer.precision).split("-")[0], True):
        others = [f"{kind}-mixed" for kind, good in supported.items() if good]
        raise UlyssesError(
            f"precision={trainer.precision!r} on a {device.device_name()} device that cannot compute in it",
            f"one of {[*others, '32-true']}",
            f"set Trainer(precision={[*others, '32-true'][0]!r})",
        )


def _fingerprint(tensor: Tensor) -> int:
    """A number that two equal tensors share and two different ones hardly ever do."""
    values = tensor.detach().flatten()
    values = values.double().view(torch.int64) if values.is_floating_point() else values.to(torch.int64)
    # An order-sensitive sum that wraps around.
    index = torch.arange(1, values.numel() + 1, dtype=torch.int64)
    return int(((values ^ (values >> 17)) * (index * 2654435761 | 1)).sum()) if values.numel() else 0


def check_same_batch(whole: WholeBatch, mesh: SequenceMesh, device: torch.device, everywhere: bool) -> None:
    """Compares the batch over the ranks of a sequence-parallel group, by length and fingerprint.

    Args:
        whole: This rank's batch.
        mesh: Sizes and groups.
        device: Where collectives take place.
        everywhere: Lets every rank of the world hear of a group that differs, so that none waits for it; only where
            all data-parallel ranks have equally many batches.

    Raises:
        UlyssesError: On every rank of the group (of the world with ``everywhere``), if they hold different batches.
    """
    if mesh.sp_group is None:
        return
    fingerprint = 0
    for tensor in whole.tensors.values():
        fingerprint = (fingerprint * 31 + _fingerprint(tensor)) & (2**62 - 1)
    mine = torch.tensor([whole.layout.seq_len, fingerprint], dtype=torch.int64, device=device)
    received = [torch.empty_like(mine) for _ in range(mesh.world_size if everywhere else mesh.sp_size)]
    dist.all_gather(received, mine, group=None if everywhere else mesh.sp_group)
    for first in range(0, len(received), mesh.sp_size):
        group = received[first : first + mesh.sp_size]
        if any(not torch.equal(other, group[0]) for other in group):
            raise UlyssesError(
                "ranks of one sequence-parallel group that hold different batches (sequence lengths "
                f"{[int(other[0]) for other in group]})",
                "the same batch on every rank of a group, since each of them trains on its slice of it",
                "leave use_distributed_sampler at True, or give the sampler num_replicas and rank from "
                "trainer.strategy.distributed_sampler_kwargs, and make the dataset deterministic",
            )


def check_intercepted(state: SequenceState, step: str, module: str, suspensions: int) -> None:
    """Refuses a model none of whose attention was seen in a first step, since it would attend within slices only.

    Args:
        state: The strategy's state.
        step: The step that ran.
        module: The user's class.
        suspensions: `SequenceState.suspensions` before the step; one that only generates is unsharded on purpose.

    Raises:
        UlyssesError: If no attention call of any step so far was intercepted, or a plan did not take place.
    """
    if state.is_planned and not state.splits and state.suspensions == suspensions:
        raise UlyssesError(
            f"a {step} of {module} that reached none of the submodules that the plan splits",
            "a step that calls at least one of them",
            "name a submodule under split that the step calls (its forward by way of the module itself, not .forward)",
        )
    if state.is_joined and state.place.region is not None:
        raise UlyssesError(
            f"a {step} of {module} that ended before it reached a submodule that the plan joins",
            "a call of one behind each split",
            "name a submodule under join that the step calls, or drop join and name the model's inputs under whole",
        )
    if state.mesh.sp_size > 1 and not state.attention_calls and state.suspensions == suspensions:
        raise UlyssesError(
            f"a {step} of {module} without a single attention call intercepted",
            "calls of torch.nn.functional.scaled_dot_product_attention, of transformers' attention functions, or of "
            "lightning_ulysses.ulysses_attention; anything else would stay within this rank's slice",
            "call torch.nn.functional.scaled_dot_product_attention by its full name, or set sp_size=1",
        )


def check_output(output: Any, module: pl.LightningModule) -> None:
    """Refuses a training step that skips its batch, whose targets the optimizer step has already counted.

    Raises:
        UlyssesError: If automatic optimisation gets no loss.
    """
    if output is None and module.automatic_optimization:
        raise UlyssesError(
            f"None from {type(module).__name__}.training_step",
            "a loss for every batch, since a step's targets are counted ahead over all micro-batches and ranks",
            "leave unwanted batches out in the dataset, or give their labels the ignore_index",
        )
