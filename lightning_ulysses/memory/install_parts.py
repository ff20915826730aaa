"""Installs the parts that a run asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from lightning_ulysses.config import MemoryConfig
from lightning_ulysses.context import SequenceContext
from lightning_ulysses.memory.checkpoint import checkpoint_blocks
from lightning_ulysses.memory.finding import Found, find_heads, find_mlps, find_norms
from lightning_ulysses.memory.head import Head
from lightning_ulysses.memory.head_chunks import cut_heads
from lightning_ulysses.memory.tiled import TiledModule
from lightning_ulysses.memory.tiled_loss import defer, touch
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.upstream.deepspeed import touch_through


@dataclass(frozen=True)
class Parts:
    """The submodules that each part is asked for, by name."""

    heads: Found
    mlps: Found
    norms: Found


def parts(root: nn.Module, config: MemoryConfig) -> Parts:
    """Finds the submodules.

    Raises:
        UlyssesError: If there are none for a part.
    """
    mlps, heads = find_mlps(root, config.tiled_mlp), find_heads(root, config.tiled_loss)
    taken = [*mlps, *heads]
    norms = find_norms(root, config.tiled_norm)
    # A norm inside of a tiled module runs on tiles already.
    outside = {name: norm for name, norm in norms.items() if not any(name.startswith(f"{other}.") for other in taken)}
    return Parts(heads, mlps, outside)


def units(root: nn.Module, config: MemoryConfig) -> list[nn.Module]:
    """The submodules of which ZeRO-3 must gather all parameters at once."""
    found = parts(root, config)
    every = [*found.heads.values(), *found.mlps.values(), *found.norms.values()]
    return [module for module in every if any(True for _ in module.children())]


def install(
    context: SequenceContext,
    root: nn.Module,
    config: MemoryConfig,
    forget: Callable[[], None] | None = None,
    say: Callable[[str], None] | None = None,
    *,
    lenient: bool = False,
) -> Handle:
    """Replaces the calls of submodules as ``config`` says.

    Args:
        context: Tells whether a step is being tried.
        root: The user's LightningModule.
        config: Which parts.
        forget: Called after a head was tried, for whoever keeps count of the module calls of a step.
        say: Tells the user which blocks are checkpointed; on rank 0 only.
        lenient: Whether MLPs and norms that do not suit run as they are, and are not refused.

    Returns:
        A handle whose ``remove()`` restores everything.

    Raises:
        UlyssesError: If there are no submodules for a part.
    """
    handle = Handle()
    found = parts(root, config)
    if config.checkpoint != "none":
        handle.add(checkpoint_blocks(context, root, config, say).remove)
    for name, module in found.mlps.items():
        handle.add(TiledModule(context, "tiled_mlp", name, module, config, lenient).install().remove)
    for name, module in found.norms.items():
        handle.add(TiledModule(context, "tiled_norm", name, module, config, lenient).install().remove)
    for name, module in found.heads.items():
        handle.add(Head(context, name, module, config, defer, forget).install().remove)
    if config.cuts_heads:
        handle.add(cut_heads(context, root, config).remove)
    if found.heads:
        # Functions of ZeRO-3 ask no tensor that stands for another one.
        handle.add(touch_through(touch).remove)
    return handle
