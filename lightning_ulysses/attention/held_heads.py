"""Key/value heads, and their gradients, that one chunk of query heads leaves to the next one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class HeldHeads:
    """The key/value head that the next chunk needs as well. There is one at most, the last of a chunk."""

    def __init__(self) -> None:
        self._heads: list[Tensor] = []

    def add(self, new: Sequence[Tensor], num_done: int) -> list[Tensor]:
        """The heads of a chunk: the one that is held, and those that came.

        Args:
            new: k and v, each (B, new heads, S, D).
            num_done: How many of the chunk's heads no later chunk needs.

        Returns:
            k and v, each (B, heads, S, D).
        """
        whole = list(new)
        if self._heads:
            pairs = zip(self._heads, new, strict=True)
            whole = [torch.cat([held, part], dim=1) if part.shape[1] else held for held, part in pairs]
        rest = whole[0].shape[1] - num_done
        # A copy of one head, where a view would hold several.
        self._heads = [part if num_done == 0 else part[:, num_done:].clone() for part in whole] if rest else []
        return whole


class HeldGradients:
    """The sum of gradients for the key/value head that the next chunk needs as well, in float32 or better."""

    def __init__(self) -> None:
        self._heads: list[Tensor] = []

    def add(self, grads: Sequence[Tensor], num_done: int) -> list[Tensor]:
        """The gradients of heads that no later chunk needs.

        Args:
            grads: Of a chunk's k and v, each (B, heads, S, D).
            num_done: How many of these heads no later chunk needs.

        Returns:
            Each (B, done heads, S, D).
        """
        held, self._heads = self._heads, []
        done = []
        for number, grad in enumerate(grads):
            total = None
            if held:
                # It is the first head of this chunk. Every chunk has one.
                total = held[number].add_(grad[:, :1])
            if num_done < grad.shape[1]:
                self._heads.append(_wide_copy(grad[:, num_done:]) if total is None or num_done else total)
            done.append(_with_first(grad[:, :num_done], total))
        return done


def _with_first(grad: Tensor, first: Tensor | None) -> Tensor:
    """``grad`` with another first head, if there is one."""
    if first is None or not grad.shape[1]:
        return grad
    first = first.to(grad.dtype)
    return first if grad.shape[1] == 1 else torch.cat([first, grad[:, 1:]], dim=1)


def _wide_copy(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
