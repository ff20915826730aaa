"""Lets ``generate`` run unsharded inside a step, on whole prompts."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from lightning_ulysses.context import SequenceState
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.gather import join_sequence
from lightning_ulysses.patching.handle import Handle


def install_generate(state: SequenceState, handle: Handle, sync_steps: bool) -> None:
    """Wraps ``GenerationMixin.generate``.

    Args:
        state: The strategy's state.
        handle: Undoes it.
        sync_steps: Whether all ranks must call forward equally often (ZeRO-3).
    """
    from transformers import GenerationMixin

    original = GenerationMixin.generate

    @functools.wraps(original)
    def generate(self: Any, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        batch, group = state.sharded_batch, state.mesh.sp_group
        if sync_steps:
            # Under ZeRO-3 every forward gathers parameters, so all ranks must take equally many steps.
            kwargs.setdefault("synced_gpus", True)
        if batch is None or group is None:
            # Outside of a region of a plan, prompts are whole; its hooks must not take them for a batch.
            with state.suspended() if state.is_planned else nullcontext():
                return original(self, inputs, *args, **kwargs)
        named = {key: kwargs.get(key) for key in ("input_ids", "attention_mask", "position_ids", "inputs_embeds")}
        shards = {shard.untyped_storage().data_ptr(): shard for shard in batch.shards.values()}

        def whole(name: str, tensor: Any) -> Any:
            shard = shards.get(tensor.untyped_storage().data_ptr()) if isinstance(tensor, Tensor) else None
            if shard is None:
                return tensor
            if tensor.shape[:2] != shard.shape[:2]:
                raise UlyssesError(
                    f"generate() on {name} of shape {tuple(tensor.shape)}, a part of this rank's slice",
                    "the whole prompt, the same on every rank",
                    "cut the prompt out of lightning_ulysses.gather_sequence(batch['input_ids'])",
                )
            joined = join_sequence(tensor, batch.layout.shares, 1, group)
            return joined[:, : batch.layout.seq_len - batch.layout.num_padding]

        kwargs |= {name: whole(name, tensor) for name, tensor in named.items() if tensor is not None}
        with state.suspended():
            return original(self, whole("inputs", inputs), *args, **kwargs)

    handle.patch(GenerationMixin, "generate", generate)
