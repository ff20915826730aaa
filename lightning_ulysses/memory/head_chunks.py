"""Has attention compute each rank's heads in chunks; the work is done in `attention.chunked`."""

from __future__ import annotations

from torch import nn

from lightning_ulysses.attention.chunked import HeadChunks, too_many_chunks
from lightning_ulysses.config import MemoryConfig
from lightning_ulysses.context import SequenceContext
from lightning_ulysses.patching.handle import Handle


def _query_heads(root: nn.Module) -> list[int]:
    """The numbers of query heads that configurations of models, such as those of transformers, name."""
    configs = [getattr(module, "config", None) for module in root.modules()]
    named = [getattr(config, "num_attention_heads", None) for config in configs]
    return [number for number in named if type(number) is int]


def cut_heads(context: SequenceContext, root: nn.Module, config: MemoryConfig) -> Handle:
    """Sets in how many chunks the following attention calls run. Without effect if P = 1.

    Args:
        context: Of the run.
        root: The user's LightningModule.
        config: How many.

    Returns:
        A handle whose ``remove()`` has attention compute all heads at once again.

    Raises:
        UlyssesError: If no model below ``root`` has so many heads. Others are refused at the call.
    """
    handle = Handle()
    most = max(_query_heads(root), default=0)
    if context.mesh.sp_size == 1:
        return handle
    ranks = context.mesh.head_ranks(most) if most else 1
    if most and config.head_chunks != "auto" and config.head_chunks > most // ranks:
        raise too_many_chunks(config.head_chunks, most, ranks)
    chunks = context.notes.of(HeadChunks)
    chunks.count, chunks.overlaps = config.head_chunks, config.overlap

    def restore() -> None:
        chunks.count, chunks.overlaps = 1, False

    handle.add(restore)
    return handle
