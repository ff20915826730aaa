"""Intercepts ``torch.nn.attention.flex_attention.flex_attention``, including compiled copies of it.

Its score and mask functions get indices of heads and positions. After the exchange each rank has the whole sequence, so
positions are right; where it has a run of the queries, theirs are shifted. Head indices are shifted by the first head
of this rank. A `BlockMask` must cover the whole sequence.

Source: torch ``nn/attention/flex_attention.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_ulysses.attention.call import AttentionCall
from lightning_ulysses.attention.grouped import heads_of
from lightning_ulysses.attention.route import route
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.geometry.mask_spec import MaskSpec
from lightning_ulysses.patching.early_bound import Function, compiled_copies
from lightning_ulysses.patching.handle import Handle

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Mod = Callable[..., Tensor]


def _check_block_mask(block_mask: BlockMask | None, num_heads: int, layout: SequenceLayout) -> None:
    """Raises `UlyssesError` unless the mask covers the whole sequence."""
    if block_mask is None:
        return
    real = layout.real_len
    # A mask has no padding of this package, so its length is the real one.
    lengths, heads = tuple(block_mask.seq_lengths), block_mask.kv_num_blocks.shape[1]
    if lengths != (real, real) or heads not in (1, num_heads):
        raise UlyssesError(
            f"flex_attention with a BlockMask of {heads} heads over {lengths} tokens, in a step of S={real}",
            f"that of the whole sequence, ({real}, {real}), of one head or all {num_heads}, the same on every rank",
            f"call create_block_mask(mask_mod, B=None, H=None, Q_LEN={real}, KV_LEN={real}), with positions and "
            "documents of the whole sequence",
        )


def _shifted(mod: Mod, first_head: int, first_query: int, heads_at: int) -> Mod:
    """``mod`` with numbers added to its argument number ``heads_at``, the index of the head, and the query after it."""

    def shifted(*args: Tensor) -> Tensor:
        head, query = args[heads_at] + first_head, args[heads_at + 1] + first_query
        return mod(*args[:heads_at], head, query, *args[heads_at + 2 :])

    return shifted


def _part_of(block_mask: BlockMask, heads: slice, first: int, last: int) -> BlockMask:
    """The part of a mask for some of the query heads and for queries ``first:last``, both at edges of blocks."""
    from torch.nn.attention.flex_attention import BlockMask

    size = block_mask.BLOCK_SIZE[0]
    rows = slice(first // size, -(-last // size))

    # A mask with one head is for all heads. (B, H | 1, blocks of queries, ...) -> (B, H_r | 1, blocks, ...)
    def cut(tensor: Tensor | None) -> Any:
        return tensor if tensor is None else (tensor if tensor.shape[1] == 1 else tensor[:, heads])[:, :, rows]

    return BlockMask.from_kv_blocks(
        cut(block_mask.kv_num_blocks),
        cut(block_mask.kv_indices),
        cut(block_mask.full_kv_num_blocks),
        cut(block_mask.full_kv_indices),
        BLOCK_SIZE=block_mask.BLOCK_SIZE,
        mask_mod=_shifted(block_mask.mask_mod, heads.start, first, 1),
        seq_lengths=(last - first, block_mask.seq_lengths[1]),
        compute_q_blocks=block_mask.q_indices is not None,
    )


@dataclass(frozen=True)
class Flex:
    """The computation of a ``flex_attention`` call over the whole sequence.

    Args:
        original: The function, or a compiled copy of it.
        score_mod: The function that changes scores.
        block_mask: The keys that each query sees.
        layout: The geometry of the batch.
        settings: Further arguments of the call.
    """

    original: Callable[..., Any]
    score_mod: Mod | None
    block_mask: BlockMask | None
    layout: SequenceLayout
    settings: Mapping[str, Any]

    @property
    def learned(self) -> None:
        """See `attention.call.Meaning`."""

    def given(self, learned: Sequence[Tensor]) -> Flex:
        """See `attention.call.Meaning`."""
        return self

    @property
    def grows(self) -> bool:
        """See `attention.call.Meaning`; a mask function does not tell."""
        return False

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: slice,
        kv_index: tuple[int, ...] | None,
        mesh: SequenceMesh,
        first: int,
    ) -> Tensor:
        """See `attention.call.Meaning`."""
        real, total = self.layout.real_len, q.shape[2]
        # Without the padding that this package added, which the mask does not cover.
        q, k, v = q[:, :, : max(real - first, 0)], k[:, :, :real], v[:, :, :real]
        # Fused kernels need groups of equal size, and the size must be a power of two. Otherwise heads are copied.
        if kv_index is None and (ratio := q.shape[1] // k.shape[1]) & (ratio - 1):
            kv_index = tuple(head // ratio for head in range(q.shape[1]))
        if kv_index is not None:
            k, v = heads_of(k, kv_index), heads_of(v, kv_index)
        if q.shape[2]:
            out = self._run(q, k, v, heads, first)
        else:
            # (B, H_r, 0, D) -> (B, H_r, 0, D_v), of the graph of q
            out = q.sum(dim=-1, keepdim=True).expand(-1, -1, -1, v.shape[3])
        # (B, H_r, queries that are no padding, D_v) -> (B, H_r, S_q, D_v)
        return nn.functional.pad(out, (0, 0, 0, total - out.shape[2]))

    def _run(self, q: Tensor, k: Tensor, v: Tensor, heads: slice, first: int) -> Tensor:
        """The user's function for the run of queries (B, H_r, S_q, D) that begins at ``first``."""
        # Blocks of a mask begin at multiples of their size: other queries fill those at the edges.
        size = 1 if self.block_mask is None else self.block_mask.BLOCK_SIZE[0]
        before, length = first % size, q.shape[2]
        begin, end = first - before, min(-(-(first + length) // size) * size, k.shape[2])
        if end - begin > length:
            q = nn.functional.pad(q, (0, 0, before, end - first - length))
        # A score function gets (score, batch, head, query, ...), a mask function (batch, head, query, ...).
        score = None if self.score_mod is None else _shifted(self.score_mod, heads.start, begin, 2)
        mask = None if self.block_mask is None else _part_of(self.block_mask, heads, begin, end)
        is_grouped = q.shape[1] != k.shape[1]
        out: Tensor = self.original(q, k, v, score, mask, enable_gqa=is_grouped, **self.settings)
        return out[:, :, before : before + length]


def _wrap(context: SequenceContext, original: Callable[..., Any]) -> Callable[..., Any]:
    def read(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: Mod | None = None,
        block_mask: BlockMask | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        kernel_options: Any = None,
        **kwargs: Any,
    ) -> AttentionCall:
        def meaning(batch: LocalBatch, known: MaskSpec | None) -> Flex:
            # The log-sum-exp would have to be exchanged like the output.
            if return_lse or any(kwargs.get("return_aux") or ()):
                raise UlyssesError(
                    "flex_attention that returns the log-sum-exp or the largest scores",
                    "a call for the output alone",
                    "leave out return_lse and return_aux, or train without sequence parallelism (sp_size=1)",
                )
            _check_block_mask(block_mask, query.shape[1], batch.layout)
            settings = {"scale": scale, "kernel_options": kernel_options}
            return Flex(original, score_mod, block_mask, batch.layout, settings)

        return AttentionCall(query, key, value, meaning)

    # Without `takes_over`, which would run the function eagerly: a compiled copy must stay compiled inside.
    @functools.wraps(original)
    def flex_attention(*args: Any, **kwargs: Any) -> Any:
        batch = context.described
        if batch is None and context.place.trial is None:
            return original(*args, **kwargs)
        return route(context, batch, read(*args, **kwargs), functools.partial(original, *args, **kwargs))

    return flex_attention


def install(context: SequenceContext, root: nn.Module, early: dict[Function, Function]) -> Handle:
    """Replaces the function and every compiled copy of it. Does nothing if P = 1.

    Args:
        context: Tells what is split at this moment.
        root: The user's LightningModule, in which compiled copies are looked for as well.
        early: Takes the replacement of each function that may have been bound early.

    Returns:
        A handle whose ``remove()`` restores everything.
    """
    handle = Handle()
    if context.mesh.sp_size > 1:
        import torch.nn.attention.flex_attention as package

        original = package.flex_attention
        # Each compiled copy keeps its own replacement, which calls that copy.
        functions: list[Function] = [original, *compiled_copies(root, original)]
        early |= {function: _wrap(context, function) for function in functions}
        handle.patch(package, "flex_attention", early[original])
    return handle
