"""All interceptors, installed and removed together."""

from __future__ import annotations

import sys

import torch
from torch import nn

from lightning_ulysses import regions, targets, upstream
from lightning_ulysses.attention import adapters, dropout, flash_attn, flex, multihead, sdpa
from lightning_ulysses.handle import Handle
from lightning_ulysses.plan import SequencePlan
from lightning_ulysses.state import SequenceState


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
    if state.mesh.sp_size > 1:
        adapters.check_adapters(module)
    handle = Handle()
    # What has been compiled so far holds the functions that are replaced here, and what will be, their replacements.
    torch.compiler.reset()
    handle.add(torch.compiler.reset)
    handle.add(upstream.keep_checkpoint_inputs().remove)
    handle.add(targets.install(state).remove)
    handle.add(dropout.install(state).remove)
    handle.add(sdpa.install(state, module).remove)
    handle.add(multihead.install(state).remove)
    handle.add(flash_attn.install(state, module).remove)
    handle.add(flex.install(state, module).remove)
    if plan is not None and state.mesh.sp_size > 1:
        try:
            handle.add(regions.install(state, module, plan).remove)
        except BaseException:
            handle.remove()
            raise
    # A module that holds a transformers model has imported it; nobody else pays for the import.
    if "transformers.modeling_utils" in sys.modules:
        from lightning_ulysses.attention import huggingface

        try:
            handle.add(huggingface.install(state, module, sync_steps=zero_stage_3).remove)
        except BaseException:
            handle.remove()
            raise
    return handle
