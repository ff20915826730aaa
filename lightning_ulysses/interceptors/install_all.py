"""All interceptors, installed and removed together."""

from __future__ import annotations

import sys

import torch
from torch import nn

from lightning_ulysses import regions
from lightning_ulysses.context import SequenceState
from lightning_ulysses.geometry.split_plan import SequencePlan
from lightning_ulysses.interceptors import (
    flash_attn,
    torch_dropout,
    torch_flex,
    torch_multihead,
    torch_sdpa,
    xformers,
)
from lightning_ulysses.interceptors.peft import check_adapters
from lightning_ulysses.loss import targets
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.upstream.deepspeed import keep_checkpoint_inputs


def install_interceptors(
    state: SequenceState, module: nn.Module, zero_stage_3: bool, plan: SequencePlan | None = None
) -> Handle:
    """Patches everything that a step may call.

    Args:
        state: The strategy's state.
        module: The user's LightningModule.
        zero_stage_3: Whether every forward gathers parameters from all ranks.
        plan: Where the model is split, in place of the batch.

    Returns:
        One handle; ``remove()`` restores everything.

    Raises:
        UlyssesError: For a model that cannot be made exact; only where P > 1.
    """
    handle = Handle()
    try:
        _install(handle, state, module, zero_stage_3, plan)
    except BaseException:
        handle.remove()
        raise
    return handle


def _install(
    handle: Handle, state: SequenceState, module: nn.Module, zero_stage_3: bool, plan: SequencePlan | None
) -> None:
    if state.mesh.sp_size > 1:
        check_adapters(module)
    # What has been compiled so far holds the functions that are replaced here, and what will be, their replacements.
    torch.compiler.reset()
    handle.add(torch.compiler.reset)
    handle.add(keep_checkpoint_inputs().remove)
    handle.add(targets.install(state).remove)
    handle.add(torch_dropout.install(state).remove)
    handle.add(torch_sdpa.install(state, module).remove)
    handle.add(torch_multihead.install(state).remove)
    handle.add(flash_attn.install(state, module).remove)
    handle.add(xformers.install(state, module).remove)
    handle.add(torch_flex.install(state, module).remove)
    if plan is not None and state.mesh.sp_size > 1:
        handle.add(regions.install(state, module, plan).remove)
    # A module that holds a transformers model has imported it; nobody else pays for the import.
    if "transformers.modeling_utils" in sys.modules:
        from lightning_ulysses.interceptors.transformers import attention

        handle.add(attention.install(state, module, sync_steps=zero_stage_3).remove)
