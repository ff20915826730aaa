"""Checkpoints the repeated blocks of a model."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch.distributed as dist
from torch import nn

from lightning_ulysses.attention.kept import OnDevice
from lightning_ulysses.config import MemoryConfig
from lightning_ulysses.context import SequenceContext
from lightning_ulysses.memory.blocks import find_blocks, refuse_checkpointed
from lightning_ulysses.memory.checkpointed import CheckpointedBlock, Checkpoints
from lightning_ulysses.memory.finding import Found
from lightning_ulysses.memory.host import check_room
from lightning_ulysses.memory.offload import HostOffload
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.regions.recompute import replace_checkpoints


def checkpoint_blocks(
    context: SequenceContext, root: nn.Module, config: MemoryConfig, say: Callable[[str], None] | None
) -> Handle:
    """Has the blocks of ``root`` keep their inputs alone.

    Args:
        context: Tells whether a step is being tried.
        root: The user's LightningModule.
        config: Which blocks, and what is kept of them.
        say: Tells the user which blocks; on rank 0 only.

    Returns:
        A handle whose ``remove()`` restores everything.

    Raises:
        UlyssesError: If there are no blocks, or the user checkpoints them already.
    """
    handle, checkpoints = Handle(), Checkpoints()
    blocks = find_blocks(root, config.checkpoint_blocks)
    refuse_checkpointed(root, blocks)
    offload = None
    if config.offload == "cpu":
        offload = HostOffload(len(blocks), partial(check_room, processes=neighbours(context)))
    keeper = None if config.checkpoint == "block" else offload or OnDevice()
    for name, module in blocks.items():
        handle.add(CheckpointedBlock(context, name, module, checkpoints, keeper, offload).install().remove)
    replace_checkpoints(root, handle, checkpoints.watch)
    if say is not None:
        devices = context.mesh.device_mesh
        on_host = offload is not None and devices is not None and devices.device_type == "cpu"
        alone = keeper is not None and context.mesh.sp_size == 1
        rest = "; on one process, attention is computed twice where rows hold no documents" if alone else ""
        rest += "; offload='cpu' saves nothing on the CPU" if on_host else ""
        say(f"checkpoint={config.checkpoint!r}: {described(blocks)}{rest}")
    return handle


def neighbours(context: SequenceContext) -> int:
    """The processes of the run on this machine; a collective."""
    if not dist.is_available() or not dist.is_initialized() or context.mesh.world_size == 1:
        return 1
    names: list[str] = [""] * context.mesh.world_size
    dist.all_gather_object(names, socket.gethostname(), group=context.mesh.host_group)
    return names.count(socket.gethostname())


def described(blocks: Found) -> str:
    """How many blocks of which classes there are, and the lists that hold them."""
    kinds = Counter((name.rpartition(".")[0], type(module).__name__) for name, module in blocks.items())
    return ", ".join(f"{count} {kind} in {parent or 'the module'}" for (parent, kind), count in kinds.items())
