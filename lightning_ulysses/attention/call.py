"""An attention call of a model in one common form, which every interceptor produces."""

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
    """The computation of an attention call over the whole sequence."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, heads: slice, kv_index: tuple[int, ...] | None, mesh: SequenceMesh
    ) -> Tensor:
        """Computes attention for the query heads of this rank.

        Args:
            q: (B, H_r, S, D).
            k: (B, heads needed, S, D).
            v: (B, heads needed, S, D_v).
            heads: The range of these query heads among all H.
            kv_index: For each query head its key/value head if groups are uneven, else None.
            mesh: Sizes and ranks.

        Returns:
            (B, H_r, S, D_v).
        """


def _unchanged(out: Tensor) -> Any:
    return out


@dataclass(frozen=True)
class AttentionCall:
    """The inputs of a call, and how to return its result in the caller's form.

    Args:
        q: (B, H, S_r, D).
        k: (B, H_kv, S_r, D). For attention to a memory (B, H_kv, S_k, D).
        v: (B, H_kv, S_r, D_v). For attention to a memory (B, H_kv, S_k, D_v).
        meaning: Returns the computation over the whole sequence. Its arguments are the batch and the `MaskSpec` that is
            known for ``mask``, or None. It may raise, so it is called only if the call is exchanged.
        mask: The mask tensor of the call.
        is_causal: Whether the call asks for causal attention.
        takes_memory: Whether the call may attend to a memory, see `route`.
        memory: Computes attention to a memory. None stands for the caller's own function.
        write: Turns (B, H, S_r, D_v) into the return value of the caller's function.
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
    """Whether a mask covers the whole sequence, (..., S, S), and not only one rank's slice."""
    return 2 <= attn_mask.dim() <= 4 and attn_mask.shape[-2:] == (layout.real_len, layout.real_len)


def local_mask_error(attn_mask: Tensor, layout: SequenceLayout) -> UlyssesError:
    """The error for a mask tensor made from one rank's slice."""
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
    """The spec and the bias of a call. Its mask tensor must be a known mask, or cover the whole sequence.

    Args:
        batch: The batch that is split.
        known: The spec of a known mask, see `mask_table`.
        mask: The mask tensor of the call.
        spec: The spec of the call without its mask tensor.

    Raises:
        UlyssesError: For a mask made from one rank's slice.
    """
    if mask is None:
        return spec, None
    if known is not None:
        return known, None
    # A mask of the whole sequence becomes a bias, of which each rank uses the part of its heads.
    if not covers_sequence(mask, batch.layout):
        raise local_mask_error(mask, batch.layout)
    return spec, mask
