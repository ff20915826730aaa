"""Installs and removes all interceptors together."""

from __future__ import annotations

import sys

import torch
from torch import nn

from lightning_ulysses import regions
from lightning_ulysses.context import SequenceContext
from lightning_ulysses.divided import aware, touched
from lightning_ulysses.interceptors import (
    flash_attn,
    highest_position,
    mixers,
    torch_draws,
    torch_flex,
    torch_multihead,
    torch_sdpa,
    xformers,
)
from lightning_ulysses.interceptors.peft import check_adapters
from lightning_ulysses.patching.early_bound import Function, rebind
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.upstream.deepspeed import keep_checkpoint_inputs, touch_through


def install_interceptors(context: SequenceContext, module: nn.Module, zero_stage_3: bool) -> Handle:
    """Patches all functions that a step may call.

    Args:
        context: Tells what is split at this moment.
        module: The user's LightningModule.
        zero_stage_3: Whether every forward gathers parameters from all ranks.

    Returns:
        A handle whose ``remove()`` restores everything.

    Raises:
        UlyssesError: For a model that cannot be made exact, if P > 1.
    """
    handle = Handle()
    try:
        _install(handle, context, module, zero_stage_3)
    except BaseException:
        handle.remove()
        raise
    return handle


def _install(handle: Handle, context: SequenceContext, module: nn.Module, zero_stage_3: bool) -> None:
    if context.mesh.sp_size > 1:
        check_adapters(module)
    # Compiled graphs hold the original functions, and later ones will hold the patches. So both are dropped.
    torch.compiler.reset()
    handle.add(torch.compiler.reset)
    handle.add(keep_checkpoint_inputs().remove)
    if zero_stage_3:
        # Its functions ask no tensor that stands for a sequence.
        handle.add(touch_through(touched).remove)
        handle.patch(torch.nn.functional, "linear", aware("linear", torch.nn.functional.linear))
    handle.add(highest_position.install(context, module).remove)
    early: dict[Function, Function] = {}
    handle.add(torch_draws.install(context, early).remove)
    handle.add(torch_sdpa.install(context, early).remove)
    handle.add(torch_multihead.install(context).remove)
    handle.add(flash_attn.install(context, early).remove)
    handle.add(xformers.install(context, early).remove)
    handle.add(torch_flex.install(context, module, early).remove)
    mixers.install(context, early)
    if context.mesh.sp_size > 1:
        # One search for all of them: it reads the globals of every imported module.
        rebind(handle, module, early)
    if context.chosen is not None:
        handle.add(regions.install(context, module, context.chosen).remove)
    # If the module contains a transformers model, the package has been imported. Otherwise it is not needed.
    if "transformers.modeling_utils" in sys.modules:
        from lightning_ulysses.interceptors.transformers import attention

        handle.add(attention.install(context, module, sync_steps=zero_stage_3).remove)
