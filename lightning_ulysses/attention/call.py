"""An attention call of a model in one common form, which every interceptor produces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lightning_ulysses.attention.mask_table import MaskTable
from lightning_ulysses.context import LocalBatch
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.mask_spec import MaskSpec


class Meaning(Protocol):
    """The computation of an attention call over the whole sequence."""

    @property
    def learned(self) -> tuple[Tensor, ...] | None:
        """Tensors beside q, k and v that need gradients. None for a user's function, which does not tell."""

    @property
    def grows(self) -> bool:
        """Whether later queries see more keys, so that they cost more."""

    def given(self, learned: Sequence[Tensor]) -> Meaning:
        """The same computation with other tensors in the place of those that are `learned`."""

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
        """Computes attention for the query heads of this rank.

        Args:
            q: (B, H_r, S_q, D), a run of queries.
            k: (B, heads needed, S, D).
            v: (B, heads needed, S, D_v).
            heads: The range of these query heads among all H.
            kv_index: For each query head its key/value head if groups are uneven, else None.
            mesh: Sizes and ranks.
            first: The place of the first query in the sequence.

        Returns:
            (B, H_r, S_q, D_v).
        """


class TokenCall(Protocol):
    """A call in which tokens meet, as a trial sees it."""

    @property
    def what(self) -> str:
        """How messages call it."""

    @property
    def operands(self) -> Mapping[str, Tensor]:
        """The tensors that carry tokens, each (..., S_r, D), by what messages call them."""

    @property
    def lengths(self) -> tuple[int, int]:
        """The tokens that see others, and those that are seen."""

    def check(self, batch: LocalBatch) -> None:
        """Raises `UlyssesError` if the call cannot be exchanged in a batch."""

    def form(self) -> Any:
        """What the caller would get, with any numbers."""


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

    @property
    def what(self) -> str:
        """See `TokenCall`."""
        return "attention call"

    @property
    def operands(self) -> Mapping[str, Tensor]:
        """See `TokenCall`."""
        return {"queries": self.q, "keys": self.k, "values": self.v}

    @property
    def lengths(self) -> tuple[int, int]:
        """See `TokenCall`."""
        return self.q.shape[-2], self.k.shape[-2]

    def check(self, batch: LocalBatch) -> None:
        """See `TokenCall`."""
        self.meaning(batch, None if self.mask is None else batch.notes.of(MaskTable).get(self.mask))

    def form(self) -> Any:
        """See `TokenCall`."""
        # (B, H, S_r, D_v) in the caller's own form
        return self.write(self.q.new_empty(*self.q.shape[:-1], self.v.shape[-1]))
