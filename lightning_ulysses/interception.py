"""All interceptors, installed and removed together."""

from __future__ import annotations

import sys

from torch import nn

from lightning_ulysses import regions, targets
from lightning_ulysses.attention import flash_attn, multihead, sdpa
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
    """
    handle = Handle()
    handle.add(targets.install(state).remove)
    handle.add(sdpa.install(state, module).remove)
    handle.add(multihead.install(state).remove)
    handle.add(flash_attn.install(state, module).remove)
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
