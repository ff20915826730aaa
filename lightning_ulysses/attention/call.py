"""One attention call of a model, as an interceptor reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lightning_ulysses.context import LocalBatch
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.geometry.mask_spec import MaskSpec


class Meaning(Protocol):
    """What an attention call computes over the whole sequence."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, heads: slice, kv_index: tuple[int, ...] | None, mesh: SequenceMesh
    ) -> Tensor:
        """Computes this rank's share of the heads.

        Args:
            q: (B, H_r, S, D).
            k: (B, heads needed, S, D).
            v: (B, heads needed, S, D_v).
            heads: Which of the H query heads these are.
            kv_index: For each query head its key/value head where groups are uneven, else None.
            mesh: Sizes and ranks.

        Returns:
            (B, H_r, S, D_v).
        """


def _unchanged(out: Tensor) -> Any:
    return out


@dataclass(frozen=True)
class AttentionCall:
    """What an interceptor reads from a call, and how it writes the result back.

    Args:
        q: (B, H, S_r, D).
        k: (B, H_kv, S_r, D); of a memory (B, H_kv, S_k, D).
        v: (B, H_kv, S_r, D_v).
        meaning: What is computed over the whole sequence of a batch, given the spec that ``mask`` is known to stand
            for. Asked only where the call is exchanged, since it may refuse.
        mask: The mask tensor of the call.
        is_causal: Whether the call says so.
        takes_memory: Whether keys may be a memory's, see `route`.
        memory: Computes attention to a memory; None for the caller's own function.
        write: Turns (B, H, S_r, D_v) into what the caller returns.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    meaning: Callable[[LocalBatch, MaskSpec | None], Meaning]
    mask: Tensor | None = None
    is_causal: bool = False
    takes_memory: bool = True
    memory: Callable[[], Tensor] | None = None
    write: Callable[[Tensor], Any] = _unchanged


def covers_sequence(attn_mask: Tensor, layout: SequenceLayout) -> bool:
    """Whether a mask is one of the whole sequence, (..., S, S), and not of one rank's slice."""
    return 2 <= attn_mask.dim() <= 4 and attn_mask.shape[-2:] == (layout.real_len, layout.real_len)


def local_mask_error(attn_mask: Tensor, layout: SequenceLayout) -> UlyssesError:
    """For a mask tensor made from one rank's slice."""
    real = layout.real_len
    return UlyssesError(
        f"an attention mask of shape {tuple(attn_mask.shape)} inside a step",
        f"no mask tensor, or that of the whole sequence, (..., {real}, {real}), the same on every rank; one made from "
        "this rank's slice makes sense only locally",
        "use is_causal=True, or call lightning_ulysses.ulysses_attention(..., is_causal=, window=, cu_seqlens=)",
    )


def read_mask(
    batch: LocalBatch, known: MaskSpec | None, mask: Tensor | None, spec: MaskSpec
) -> tuple[MaskSpec, Tensor | None]:
    """The spec and the bias of a call whose mask tensor has to be known, or to cover the whole sequence.

    Args:
        batch: The batch that is split.
        known: The spec that the mask is known to stand for.
        mask: The mask tensor of the call.
        spec: What holds beside a bias, or without a mask.

    Raises:
        UlyssesError: For a mask made from one rank's slice.
    """
    if mask is None:
        return spec, None
    if known is not None:
        return known, None
    if not covers_sequence(mask, batch.layout):
        raise local_mask_error(mask, batch.layout)
    return spec, mask
