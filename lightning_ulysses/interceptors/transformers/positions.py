"""Positions of RoBERTa and its relatives: padding gets ``padding_idx``, other tokens count up from there.

These models compute positions from the token ids, for which they need the whole sequence. So their own function is
called on the whole sequence, and each rank takes its slice. Packed documents are numbered one by one.

Source: transformers ``create_position_ids_from_input_ids`` of ``models/*/modeling_*.py``.
"""

from __future__ import annotations

import inspect
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.gather import join_sequence
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.patching.outside_graphs import eager
from lightning_ulysses.sequence import check_share

FUNCTION = "create_position_ids_from_input_ids"
Create = Callable[[Tensor, int], Tensor]


def _own_function(module: nn.Module) -> Create | None:
    """The function with which ``module`` computes positions from token ids; None if it has no such function."""
    # transformers defines it as a method in some models and as a function of the file in others.
    if not isinstance(getattr(module, "padding_idx", None), int):
        return None
    if "position_ids" not in inspect.signature(module.forward).parameters:
        return None
    found = getattr(module, FUNCTION, None) or getattr(sys.modules.get(type(module).__module__), FUNCTION, None)
    return found if callable(found) else None


class Numbering:
    """Replaces the positions that `supply_inputs` added by those that the model would compute itself.

    Args:
        context: Tells what is split at this moment.
    """

    def __init__(self, context: SequenceContext) -> None:
        self._context = context
        #: Whether any module computes positions from token ids.
        self.is_used = False
        # A few of them: the outer model supplies positions, and its embeddings ask for them soon after.
        self._supplied: deque[Tensor] = deque(maxlen=4)

    def supplied(self, positions: Tensor) -> Tensor:
        """``positions`` as a new tensor object, to distinguish it from positions that a user passes."""
        # (B | 1, S_r) -> (B | 1, S_r)
        positions = positions.view_as(positions)
        self._supplied.append(positions)
        return positions

    def install(self, root: nn.Module, handle: Handle) -> None:
        """Hooks every submodule of ``root`` that computes positions from token ids."""
        for module in root.modules():
            create = _own_function(module)
            if create is not None:
                self.is_used = True
                handle.add(module.register_forward_pre_hook(self._hook(module, create), with_kwargs=True).remove)

    def _hook(self, module: nn.Module, create: Create) -> Callable[..., Any]:
        signature, padding = inspect.signature(module.forward), int(module.padding_idx)  # type: ignore[arg-type]

        @eager
        def number(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            bound = signature.bind_partial(*args, **kwargs)
            given, tokens = (bound.arguments.get(key) for key in ("position_ids", "input_ids"))
            # Positions that the user passes reach the model unchanged.
            if not self._is_supplied(module, given):
                return None
            batch = self._context.described
            assert batch is not None
            numbers: Tensor | None
            if isinstance(tokens, Tensor):
                numbers = self._numbers(tokens, batch, create, padding)
            else:
                # From embeddings, padding cannot be recognized. (B | 1, S_r) -> (B, S_r)
                rows = bound.arguments["inputs_embeds"].shape[0]
                numbers = None if given is None else (given + padding + 1).expand(rows, -1)
            if numbers is None:
                return None
            bound.arguments["position_ids"] = numbers
            return bound.args, bound.kwargs

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return number(args, kwargs) if self._context.described is not None else None

        return hook

    def _is_supplied(self, module: nn.Module, given: Tensor | None) -> bool:
        """Whether positions are not the user's; a collective in a trial, whose ranks must not part here."""
        mine = given is None or any(given is own for own in self._supplied)
        group = self._context.mesh.sp_group
        if group is None or not self._context.place.takes_calls:
            return mine
        everyone = [mine] * self._context.mesh.sp_size
        dist.all_gather_object(everyone, mine, group=group)
        if len(set(everyone)) > 1:
            raise UlyssesError(
                f"positions that the model around {type(module).__name__} changes where a slice has a certain length",
                "the positions of a slice as they are",
                "give the model inputs that it need not pad, or set split='blocks' in the strategy",
            )
        return mine

    def _numbers(self, tokens: Tensor, batch: LocalBatch, create: Create, padding: int) -> Tensor:
        """Token ids (B, S_r) -> positions (B, S_r)."""
        rank = self._context.mesh.sp_rank
        layout, group = batch.layout, self._context.mesh.sp_group
        check_share(tokens.shape[1], layout, rank, "input_ids")
        whole = tokens.clone() if group is None else join_sequence(tokens, layout.shares, 1, group)
        # Padding that this package added would count further, perhaps beyond the last position embedding.
        whole[:, layout.real_len :] = padding
        documents = layout.documents if batch.document_positions is not None else None
        if documents is None:
            return create(whole, padding)[:, layout.spans[rank]]
        rows = [
            torch.cat([create(whole[row : row + 1, begin:end], padding) for begin, end in runs], dim=1)
            for row, runs in enumerate(documents)
        ]
        return torch.cat(rows)[:, layout.spans[rank]]
