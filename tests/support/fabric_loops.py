"""A loop as users of Fabric write it, and the same loop on one process without Fabric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ulysses import UlyssesFabricStrategy
from lightning_ulysses.testing import StepResult, snapshot


@dataclass(frozen=True)
class Loop:
    """How a loop trains.

    Args:
        make: Builds the module.
        loss: The loss of a batch, from the module and the batch.
        batches: Whole micro-batches, dealt to groups in turn.
        accumulate: Micro-batches of a step in each group.
        clip: Largest norm of the gradient.
        count: Targets of a batch, where groups and micro-batches are weighted by them.
        world: W and P.
        strategy: Its settings.
        fabric: Those of Fabric.
    """

    make: Callable[[], nn.Module]
    loss: Callable[[Any, Any], Tensor]
    batches: Sequence[Any]
    accumulate: int = 1
    clip: float | None = None
    count: Callable[[Any], float] | None = None
    world: tuple[int, int] = (2, 2)
    strategy: dict[str, Any] = field(default_factory=dict)
    fabric: dict[str, Any] = field(default_factory=dict)

    @property
    def dp_size(self) -> int:
        return self.world[0] // self.world[1]


def rows_loss(model: Any, batch: Tensor) -> Tensor:
    """As LitGPT's script has it: the loop makes inputs and targets of rows of tokens."""
    logits = model(batch[:, :-1])
    # (B, S, V) -> (B * S, V), (B, S) -> (B * S,)
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), batch[:, 1:].reshape(-1))


def own_loss(model: Any, batch: Any) -> Tensor:
    """The loss that a model of transformers computes."""
    # With a cache, transformers does not see that positions restart where a document begins.
    loss: Tensor = model(**batch, use_cache=False).loss
    return loss


def launched(world: int, settings: dict[str, Any], **more: Any) -> Fabric:
    fabric = Fabric(accelerator="cpu", devices=world, strategy=UlyssesFabricStrategy(**settings), **more)
    fabric.launch()
    return fabric


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5)


def train(rank: int, loop: Loop) -> tuple[StepResult, set[int]]:
    """Trains on one rank; also returns how many tokens blocks saw."""
    fabric = launched(loop.world[0], {"sp_size": loop.world[1], **loop.strategy}, **loop.fabric)
    module = loop.make().train()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    model, optimizer = fabric.setup(module, sgd(module))
    mine = list(loop.batches)[fabric.strategy.mesh.dp_rank :: loop.dp_size]
    loader = fabric.setup_dataloaders(DataLoader(mine, batch_size=None), use_distributed_sampler=False)
    seen: set[int] = set()
    watched = next(each for each in module.modules() if isinstance(each, nn.ModuleList))[0]
    losses, norms = [], []
    for number, batch in enumerate(loader, 1):
        is_accumulating = number % loop.accumulate != 0
        # From the second step on, when the first one has decided where to split.
        hook = watched.register_forward_pre_hook(
            lambda module, args, kwargs, number=number: seen.update({_tokens(args, kwargs)} if number > 1 else ()),
            with_kwargs=True,
        )
        with fabric.no_backward_sync(model, enabled=is_accumulating):
            loss = loop.loss(model, batch)
            scale = 1 / loop.accumulate
            if loop.count is not None:
                window = mine[(number - 1) // loop.accumulate * loop.accumulate :][: loop.accumulate]
                scale = fabric.strategy.target_weight(loop.count(batch), sum(map(loop.count, window)))
            fabric.backward(loss * scale)
        hook.remove()
        losses.append(float(loss.detach()))
        if not is_accumulating:
            # Nothing to compare without clipping.
            norms.append(1.0)
            if loop.clip is not None:
                norms[-1] = float(fabric.clip_gradients(model, optimizer, max_norm=loop.clip))
            optimizer.step()
            optimizer.zero_grad()
    after = snapshot(module)
    fabric.strategy.close()
    return StepResult(tuple(losses), tuple(norms), before, after), seen


def _tokens(args: Any, kwargs: Any) -> int:
    hidden = args[0] if args else kwargs["hidden_states"]
    return int(hidden.shape[1])


def plain(loop: Loop) -> list[StepResult]:
    """The same on one process, which takes the micro-batches of all groups; for each group its losses."""
    module = loop.make().train()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    optimizer = sgd(module)
    size, norms = loop.accumulate * loop.dp_size, []
    losses: list[list[float]] = [[] for _ in range(loop.dp_size)]
    for first in range(0, len(loop.batches), size):
        step = loop.batches[first : first + size]
        weights = [1 / size] * size
        if loop.count is not None:
            counts = list(map(loop.count, step))
            weights = [count / sum(counts) for count in counts]
        for number, (batch, weight) in enumerate(zip(step, weights, strict=True)):
            loss = loop.loss(module, batch)
            (loss * weight).backward()
            losses[number % loop.dp_size].append(float(loss.detach()))
        norms.append(1.0)
        if loop.clip is not None:
            norms[-1] = float(nn.utils.clip_grad_norm_(module.parameters(), loop.clip))
        optimizer.step()
        optimizer.zero_grad()
    after = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    return [StepResult(tuple(each), tuple(norms), before, after) for each in losses]
