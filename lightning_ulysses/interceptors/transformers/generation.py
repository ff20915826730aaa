"""Makes ``generate`` run unsharded inside a step, on whole prompts."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from lightning_ulysses.context import SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.gather import join_sequence
from lightning_ulysses.notes import StorageTable
from lightning_ulysses.patching.handle import Handle


def install_generate(context: SequenceContext, handle: Handle, sync_steps: bool) -> None:
    """Wraps ``GenerationMixin.generate``.

    Args:
        context: Tells what is split at this moment.
        handle: Takes the undo.
        sync_steps: Whether all ranks must call forward equally often (ZeRO-3).
    """
    from transformers import GenerationMixin

    original = GenerationMixin.generate

    @functools.wraps(original)
    def generate(self: Any, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        batch, group = context.split, context.mesh.sp_group
        if sync_steps:
            # Under ZeRO-3 every forward gathers parameters, so all ranks must generate equally many tokens.
            kwargs.setdefault("synced_gpus", True)
        if batch is None or group is None:
            # Prompts are whole outside of a region. The plan's hooks must not split them.
            with context.suspended() if context.plan is not None else nullcontext():
                return original(self, inputs, *args, **kwargs)
        named = {key: kwargs.get(key) for key in ("input_ids", "attention_mask", "position_ids", "inputs_embeds")}
        # Slices of the batch are recognized by their storage, also as views.
        shards: StorageTable[Tensor] = StorageTable()
        for each in batch.shards.values():
            shards[each] = each

        def whole(name: str, tensor: Any) -> Any:
            shard = shards.get(tensor) if isinstance(tensor, Tensor) else None
            if shard is None:
                return tensor
            # A view with another shape, such as the first tokens of the slice.
            if tensor.shape[:2] != shard.shape[:2]:
                raise UlyssesError(
                    f"generate() on {name} of shape {tuple(tensor.shape)}, a part of this rank's slice",
                    "the whole prompt, the same on every rank",
                    "cut the prompt out of lightning_ulysses.gather_sequence(batch['input_ids'])",
                )
            joined = join_sequence(tensor, batch.layout.shares, 1, group)
            return joined[:, : batch.layout.real_len]

        kwargs |= {name: whole(name, tensor) for name, tensor in named.items() if tensor is not None}
        with context.suspended():
            return original(self, whole("inputs", inputs), *args, **kwargs)

    handle.patch(GenerationMixin, "generate", generate)
