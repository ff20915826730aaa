"""A loop of Fabric's on several processes is that of one process."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from exact import BOUND
from fabric_loops import Loop, launched, own_loss, plain, rows_loss, sgd, train
from models import VOCAB, LlamaModule, count_targets, token_batch
from nightly import mostly
from planned import GPT
from torch import Tensor, nn

from lightning_ulysses.testing import compare
from lightning_ulysses.testing.processes import ProcessPool


def gpt(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return GPT(**settings)


def llama(**settings: Any) -> nn.Module:
    model: nn.Module = LlamaModule(**settings).model
    return model


def rows(count: int, length: int = 34, batch: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB, (batch, length), generator=generator) for _ in range(count)]


def padded(seed: int) -> dict[str, Tensor]:
    batch = token_batch(seed, 33, 2, "uneven")
    mask = torch.ones_like(batch["input_ids"])
    mask[1, 20:] = 0
    return {**batch, "labels": batch["labels"].masked_fill(mask == 0, -100), "attention_mask": mask}


def packed(seed: int) -> dict[str, Tensor]:
    batch = token_batch(seed, 33, 1, "uneven")
    positions = torch.cat([torch.arange(12), torch.arange(21)])[None]
    labels = batch["labels"].masked_fill(positions == 0, -100)
    return {**batch, "labels": labels, "position_ids": positions}


def chunked(model: Any, batch: Tensor) -> Tensor:
    """As LitGPT's ``chunked_cross_entropy`` has it."""
    logits, targets = model(batch[:, :-1]), batch[:, 1:]
    logits, targets = logits.reshape(-1, logits.size(-1)), targets.reshape(-1)
    parts = [
        F.cross_entropy(x, y, ignore_index=-100, reduction="none")
        for x, y in zip(logits.split(8), targets.split(8), strict=True)
    ]
    kept = (targets != -100).sum()
    return torch.cat(parts).sum() / kept.maximum(torch.ones_like(kept))


def preferred(model: Any, batch: Tensor) -> Tensor:
    """Two calls in a step, of two lengths."""
    first, second = model(batch[:, :-1]), model(batch[:, :21])
    return F.softplus(second.logsumexp(-1).mean() + first.log_softmax(-1)[:, -1].mean())


def hooked(model: Any, batch: Tensor) -> Tensor:
    """The gradient of the logits is another one, by a hook that sees the whole."""
    logits = model(batch[:, :-1])
    logits.register_hook(lambda gradient: gradient * (1 + gradient.abs().sum()))
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


GPT_ROWS = Loop(gpt, rows_loss, rows(4))
LLAMA = Loop(llama, own_loss, [token_batch(seed, 33, 2, "uneven") for seed in range(4)])
CASES: dict[str, Loop] = {
    "accumulated, clipped, zero 1": replace(GPT_ROWS, accumulate=2, clip=0.5, strategy={"stage": 1}),
    "accumulated, clipped, zero 2": replace(GPT_ROWS, accumulate=2, clip=0.5),
    "accumulated, clipped, zero 3": replace(GPT_ROWS, accumulate=2, clip=0.5, strategy={"stage": 3}),
    "dp x sp, accumulated, zero 2": replace(GPT_ROWS, accumulate=2, clip=0.5, world=(4, 2)),
    "dp x sp, zero 3": replace(GPT_ROWS, world=(4, 2), strategy={"stage": 3}),
    "three ranks, odd heads, odd length": replace(
        GPT_ROWS, make=partial(gpt, heads=3, groups=1, width=24), batches=rows(2, 33, 2), world=(3, 3)
    ),
    "four ranks": replace(GPT_ROWS, world=(4, 4)),
    "not split": replace(GPT_ROWS, world=(1, 1), accumulate=2, clip=0.5),
    "groups alone": replace(GPT_ROWS, world=(2, 1), clip=0.5),
    "a plan": replace(GPT_ROWS, strategy={"plan": "litgpt"}),
    "tokens in chunks": replace(GPT_ROWS, loss=chunked, batches=rows(2, 34, 2)),
    "two calls in a step": replace(GPT_ROWS, loss=preferred),
    "a hook on logits": replace(GPT_ROWS, loss=hooked, batches=rows(2)),
    "checkpointed blocks": replace(GPT_ROWS, make=partial(gpt, checkpoints="block")),
    "transformers, a mean of means": replace(LLAMA, accumulate=2),
    "transformers, padded, zero 3": replace(LLAMA, batches=list(map(padded, range(2))), strategy={"stage": 3}),
    "transformers, packed": replace(LLAMA, batches=list(map(packed, range(2)))),
    "transformers, dp x sp, weighted by targets": replace(LLAMA, accumulate=2, world=(4, 2), count=count_targets),
    "tiled loss": replace(LLAMA, strategy={"memory": {"tiled_loss": True, "tile_tokens": 5}}),
    "heads in chunks, checkpointed": replace(LLAMA, strategy={"memory": {"head_chunks": 2, "checkpoint": "block"}}),
}


# The same loop at other stages and in other worlds.
SELDOM = ("accumulated, clipped, zero 1", "accumulated, clipped, zero 2", "dp x sp, zero 3", "four ranks")


@pytest.mark.parametrize("case", mostly(CASES, SELDOM))
def test_a_loop_is_that_of_one_process(pool: ProcessPool, case: str) -> None:
    loop = CASES[case]
    wanted = plain(loop)
    assert wanted[0].step().norm() > 1e-3
    for rank, (result, seen) in enumerate(pool.run(train, loop, world_size=loop.world[0])):
        difference = compare(result, wanted[rank // loop.world[1]])
        assert difference.largest <= BOUND, difference
        longest = max(
            each.shape[1] if isinstance(each, Tensor) else each["input_ids"].shape[1] for each in loop.batches
        )
        assert loop.world[1] == 1 or (seen and max(seen) <= -(-longest // loop.world[1])), seen


def broken(rank: int, loop: Loop, target: str, replacement: Any) -> Any:
    with mock.patch(target, replacement):
        return train(rank, loop)


def of_slices(part: Tensor, division: Any) -> Tensor:
    return part


def half(self: Any, count: float, total: float | None = None) -> float:
    return 0.5


def one(optimizer: Any) -> Tensor:
    return torch.tensor(1.0)


CONTROLS: dict[str, tuple[Loop, str, Any]] = {
    "sums over ranks": (GPT_ROWS, "lightning_ulysses.divided.losses.sum_of", of_slices),
    "weights": (
        CASES["transformers, dp x sp, weighted by targets"],
        "lightning_ulysses.fabric.UlyssesFabricStrategy.target_weight",
        half,
    ),
    "clipping": (
        replace(GPT_ROWS, clip=0.01),
        "lightning_ulysses.upstream.deepspeed.gradient_norm",
        one,
    ),
}


@pytest.mark.parametrize("mechanism", CONTROLS)
def test_without_a_mechanism_it_is_wrong(pool: ProcessPool, mechanism: str) -> None:
    loop, target, replacement = CONTROLS[mechanism]
    wanted = plain(loop)
    for rank, (result, _) in enumerate(pool.run(broken, loop, target, replacement, world_size=loop.world[0])):
        assert compare(result, wanted[rank // loop.world[1]]).largest > 100 * BOUND


def drop(rank: int, stage: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A backward whose gradients are dropped, and a step without clipping after one with it."""
    from lightning_ulysses.testing import snapshot

    fabric, module = launched(2, {"sp_size": 2, "stage": stage}), gpt().train()
    model, optimizer = fabric.setup(module, sgd(module))
    batches = rows(3)
    with fabric.no_backward_sync(model):
        fabric.backward(rows_loss(model, batches[0]))
    optimizer.zero_grad()
    for batch, clip in zip(batches[1:], (0.01, None), strict=True):
        fabric.backward(rows_loss(model, batch))
        if clip:
            fabric.clip_gradients(model, optimizer, max_norm=clip)
        optimizer.step()
        optimizer.zero_grad()
    after = snapshot(module)
    fabric.strategy.close()
    single = gpt().train()
    alone = sgd(single)
    for batch, clip in zip(batches[1:], (0.01, None), strict=True):
        rows_loss(single, batch).backward()
        if clip:
            nn.utils.clip_grad_norm_(single.parameters(), clip)
        alone.step()
        alone.zero_grad()
    return after, {name: parameter.detach() for name, parameter in single.named_parameters()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_grad_drops_gradients_and_clipping_lasts_one_step(pool: ProcessPool, stage: int) -> None:
    for after, wanted in pool.run(drop, stage, world_size=2):
        for name, value in wanted.items():
            assert float((after[name] - value).norm() / value.norm()) <= BOUND, name
