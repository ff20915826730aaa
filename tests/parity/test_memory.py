"""Parts that run tile by tile: a step on several processes against one process without them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from exact import BOUND, check, fit_broken
from models import HandWritten, LlamaModule, count_targets, pair_batch, token_batch
from nightly import mostly
from torch import Tensor

from lightning_ulysses.memory.deferred_logits import DeferredLogits
from lightning_ulysses.testing import SplitRun, compare, fit_single, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool

ALL = {"tiled_loss": True, "tiled_mlp": True, "tiled_norm": True, "tile_tokens": 3}


class Checkpointed(LlamaModule):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.model.gradient_checkpointing_enable({"use_reentrant": False})


class Adapted(LlamaModule):
    """LoRA on the head and on MLPs."""

    def __init__(self) -> None:
        import peft

        super().__init__()
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["lm_head", "up_proj"], init_lora_weights=False)
        self.model = peft.get_peft_model(self.model, config)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Tied(LlamaModule):
    def __init__(self) -> None:
        super().__init__()
        self.model.config.tie_word_embeddings = True
        self.model.lm_head.weight = self.model.model.embed_tokens.weight


class Deferring(LlamaModule):
    """Fails where logits of a training step are not deferred."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self.model(**batch)
        if self._trainer is not None and self.trainer.global_step:
            assert isinstance(output.logits, DeferredLogits)
        return output.loss


def llama(kind: type = LlamaModule, **settings: Any) -> Any:
    return partial(kind, **settings)


def batches(count: int) -> list[Any]:
    return [token_batch(seed, 33, 2, "uneven") for seed in range(count)]


CASES: dict[str, tuple[Any, list[Any], SplitRun, int]] = {
    "stage 1, accumulation": (
        llama(), batches(2), SplitRun(strategy={"stage": 1, "memory": ALL}, trainer={"accumulate_grad_batches": 2}), 1,
    ),
    "stage 2, two steps": (llama(Deferring), batches(2), SplitRun(strategy={"stage": 2, "memory": ALL}), 2),
    "stage 3, two steps": (llama(Deferring), batches(2), SplitRun(strategy={"stage": 3, "memory": ALL}), 2),
    "stage 3, accumulation, checkpoints, odd heads": (
        llama(Checkpointed, heads=9, kv_heads=3), batches(2),
        SplitRun(strategy={"stage": 3, "memory": ALL}, trainer={"accumulate_grad_batches": 2}), 1,
    ),
    "a slice without a label": (
        llama(), [token_batch(1, 32, 1, "first_half")], SplitRun(strategy={"stage": 3, "memory": ALL}), 1,
    ),
    "LoRA at stage 3": (llama(Adapted), batches(1), SplitRun(strategy={"stage": 3, "memory": ALL}), 1),
    "a tied head at stage 3": (llama(Tied), batches(1), SplitRun(strategy={"stage": 3, "memory": ALL}), 1),
    "split inside at stage 3": (
        llama(), batches(1), SplitRun(strategy={"stage": 3, "memory": ALL, "split": "blocks"}), 1,
    ),
    "hand-written": (
        partial(HandWritten, kv_heads=2), [pair_batch(1, 33, 2, "uneven")],
        SplitRun(strategy={"stage": 3, "memory": ALL}), 1,
    ),
}  # fmt: skip


SELDOM = ("stage 1, accumulation", "stage 3, two steps")


@pytest.mark.parametrize("name", mostly(CASES, SELDOM))
def test_step(pool: ProcessPool, name: str) -> None:
    make, data, run, steps = CASES[name]
    check(pool, make, data, run, steps)


def only_the_first(self: Any, gradients: Any) -> None:
    """Loses what the tiles after the first one add."""
    for index, gradient in enumerate(gradients):
        if self._sums[index] is None:
            self._sums[index] = gradient


def test_a_lost_tile_is_seen(pool: ProcessPool) -> None:
    """The negative control."""
    data = batches(1)
    wanted = fit_single(llama(), [data], count_targets)
    run = SplitRun(strategy={"memory": ALL})
    target = "lightning_ulysses.memory.tiles.GradientSums.add"
    found = pool.run(fit_broken, llama(), data, run, target, only_the_first, world_size=2)
    assert all(compare(each, wanted).step > 100 * BOUND for each in found)


class Kept(LlamaModule):
    """Counts the bytes that the forward of its last step keeps, each storage once, without parameters."""

    kept = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        held: dict[int, Tensor] = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: _hold(held, tensor), lambda tensor: tensor)
        with hooks:
            loss = super().training_step(batch, batch_idx)
        own = {parameter.untyped_storage()._cdata for parameter in self.parameters()}
        self.kept = sum(each.untyped_storage().nbytes() for key, each in held.items() if key not in own)
        return loss


def _hold(held: dict[int, Tensor], tensor: Tensor) -> Tensor:
    held[tensor.untyped_storage()._cdata] = tensor
    return tensor


def kept_bytes(rank: int, memory: dict[str, Any] | None) -> int:
    module, run = Kept(), SplitRun(strategy={"memory": memory})
    split_trainer(run).fit(module, split_loader([token_batch(seed, 128, 1) for seed in range(2)], run, rank))
    return module.kept


def test_kept_bytes(pool: ProcessPool) -> None:
    """On each of two ranks, in the second step."""
    plain = pool.run(kept_bytes, None, world_size=2)
    tiled = pool.run(kept_bytes, {**ALL, "tile_tokens": 8}, world_size=2)
    assert all(after < 0.6 * before for before, after in zip(plain, tiled, strict=True)), (plain, tiled)
