"""Intercepts ``torch.nn.attention.flex_attention.flex_attention``, including compiled copies of it.

Its score and mask functions get indices of heads and positions. After the exchange each rank has the whole sequence, so
positions are right. Head indices are shifted by the first head of this rank. A `BlockMask` must cover the whole
sequence.

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
from lightning_ulysses.patching.early_bound import compiled_copies, rebind
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


def _shifted(mod: Mod, first: int, heads_at: int) -> Mod:
    """``mod`` with ``first`` added to its argument number ``heads_at``, the index of the head."""

    def shifted(*args: Tensor) -> Tensor:
        return mod(*args[:heads_at], args[heads_at] + first, *args[heads_at + 1 :])

    return shifted


def _of_heads(block_mask: BlockMask, heads: slice) -> BlockMask:
    """The part of a mask for some of the query heads."""
    from torch.nn.attention.flex_attention import BlockMask

    # A mask with one head is for all heads.
    def cut(tensor: Tensor | None) -> Any:
        return tensor if tensor is None or tensor.shape[1] == 1 else tensor[:, heads]

    return BlockMask.from_kv_blocks(
        cut(block_mask.kv_num_blocks),
        cut(block_mask.kv_indices),
        cut(block_mask.full_kv_num_blocks),
        cut(block_mask.full_kv_indices),
        BLOCK_SIZE=block_mask.BLOCK_SIZE,
        mask_mod=_shifted(block_mask.mask_mod, heads.start, 1),
        seq_lengths=block_mask.seq_lengths,
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

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, heads: slice, kv_index: tuple[int, ...] | None, mesh: SequenceMesh
    ) -> Tensor:
        """See `attention.call.Meaning`."""
        # Without the padding that this package added, which the mask does not cover.
        q, k, v = (t[:, :, : self.layout.real_len] for t in (q, k, v))
        # Fused kernels need groups of equal size, and the size must be a power of two. Otherwise heads are copied.
        if kv_index is None and (ratio := q.shape[1] // k.shape[1]) & (ratio - 1):
            kv_index = tuple(head // ratio for head in range(q.shape[1]))
        if kv_index is not None:
            k, v = heads_of(k, kv_index), heads_of(v, kv_index)
        # A score function gets (score, batch, head, ...), a mask function (batch, head, ...).
        score = None if self.score_mod is None else _shifted(self.score_mod, heads.start, 2)
        mask = None if self.block_mask is None else _of_heads(self.block_mask, heads)
        is_grouped = q.shape[1] != k.shape[1]
        out: Tensor = self.original(q, k, v, score, mask, enable_gqa=is_grouped, **self.settings)
        # (B, H_r, S without padding, D_v) -> (B, H_r, S, D_v)
        return nn.functional.pad(out, (0, 0, 0, self.layout.num_padding))


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


def install(context: SequenceContext, root: nn.Module) -> Handle:
    """Replaces the function and every compiled copy of it. Does nothing if P = 1.

    Args:
        context: Tells what is split at this moment.
        root: The user's LightningModule. References to the function are replaced in it as well.

    Returns:
        A handle whose ``remove()`` restores everything.
    """
    handle = Handle()
    if context.mesh.sp_size > 1:
        import torch.nn.attention.flex_attention as package

        original = package.flex_attention
        # Each compiled copy keeps its own replacement, which calls that copy.
        for function in compiled_copies(root, original):
            rebind(handle, root, function, _wrap(context, function))
        replacement = _wrap(context, original)
        handle.patch(package, "flex_attention", replacement)
        rebind(handle, root, original, replacement)
    return handle
