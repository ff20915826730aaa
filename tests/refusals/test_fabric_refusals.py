"""What is refused in a loop of Fabric's, in which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from fabric_loops import launched, rows_loss, sgd
from models import VOCAB
from planned import GPT
from torch import Tensor, nn

from lightning_ulysses import UlyssesError, UlyssesFabricStrategy
from lightning_ulysses.config import REGISTERED
from lightning_ulysses.testing.processes import ProcessPool

ROWS = torch.randint(0, VOCAB, (1, 34), generator=torch.Generator().manual_seed(0))


def test_names_are_registered() -> None:
    for suffix, settings in REGISTERED.items():
        fabric = L.Fabric(accelerator="cpu", devices=1, strategy=f"ulysses_deepspeed{suffix}")
        assert isinstance(fabric.strategy, UlyssesFabricStrategy)
        assert fabric.strategy.config["zero_optimization"]["stage"] == settings["stage"]


def test_settings() -> None:
    for settings, text in (
        ({"plan": "litgpt_unjoined"}, "'litgpt_unjoined', which joins nothing"),
        ({"stage": 0}, "ZeRO stage 0"),
        ({"sp_size": 0}, "sp_size=0"),
        ({"dp_replicate_size": 2}, "dp_replicate_size=2"),
        ({"config": {"gradient_accumulation_steps": 2}}, "gradient_accumulation_steps"),
        ({"memory": {"tiles": 2}}, "memory="),
        ({"spsize": 2}, "write 'sp_size'"),
    ):
        with pytest.raises(UlyssesError) as caught:
            UlyssesFabricStrategy(**settings)  # type: ignore[arg-type]
        assert text in str(caught.value)


class Mixing(nn.Module):
    """A convolution between two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = GPT()
        self.conv = nn.Conv1d(32, 32, 3, padding=1)

    def forward(self, idx: Tensor) -> Tensor:
        gpt = self.gpt
        x = gpt.transformer.wte(idx)
        cos, sin = gpt.cos[: idx.shape[1]][None], gpt.sin[: idx.shape[1]][None]
        for block in gpt.transformer.h:
            x = block(self.conv(x.mT).mT, cos, sin)
        return gpt.lm_head(x)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, VOCAB)

    def forward(self, idx: Tensor) -> Tensor:
        return self.embed(idx)


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2


def _twice(fabric: L.Fabric, model: Any, optimizer: Any) -> None:
    for _ in range(2):
        fabric.backward(rows_loss(model, ROWS))


def _early(fabric: L.Fabric, model: Any, optimizer: Any) -> None:
    with fabric.no_backward_sync(model):
        fabric.backward(rows_loss(model, ROWS))
    optimizer.step()


def _clip_early(fabric: L.Fabric, model: Any, optimizer: Any) -> None:
    with fabric.no_backward_sync(model):
        fabric.backward(rows_loss(model, ROWS))
    fabric.clip_gradients(model, optimizer, max_norm=1.0)


def _clip(**settings: Any) -> Callable[..., None]:
    def clip(fabric: L.Fabric, model: Any, optimizer: Any) -> None:
        fabric.backward(rows_loss(model, ROWS))
        fabric.clip_gradients(model, optimizer, **settings)

    return clip


def _not_finite(fabric: L.Fabric, model: Any, optimizer: Any) -> None:
    fabric.backward(rows_loss(model, ROWS) * float("nan"))
    fabric.clip_gradients(model, optimizer, max_norm=1.0)


def _other_batches(fabric: L.Fabric, model: Any, optimizer: Any) -> None:
    rows_loss(model, (ROWS + fabric.global_rank) % VOCAB)


def _own_function(fabric: L.Fabric, model: Any, optimizer: Any) -> None:
    logits = Own.apply(model(ROWS[:, :-1]))
    fabric.backward(F.cross_entropy(logits.flatten(0, 1), ROWS[:, 1:].flatten()))


LOOPS: dict[str, tuple[Callable[..., None], str]] = {
    "two last backwards": (_twice, "a second backward before optimizer.step()"),
    "a step too early": (_early, "optimizer.step() after a backward inside fabric.no_backward_sync"),
    "a step without gradients": (lambda f, m, o: o.step(), "optimizer.step() without a backward"),
    "a closure": (lambda f, m, o: o.step(lambda: None), "optimizer.step(closure)"),
    "clipping too early": (_clip_early, "clip_gradients before the last backward"),
    "clipping by value": (_clip(clip_val=1.0), "clip_gradients(clip_val=1.0)"),
    "clipping by another norm": (_clip(max_norm=1.0, norm_type=1), "clip_gradients(norm_type=1)"),
    "a norm that is not finite": (_not_finite, "gradients whose norm is infinite or NaN"),
    "a second module": (lambda f, m, o: f.setup_module(GPT()), "a second module in fabric.setup, after GPT"),
    "other batches in a group": (_other_batches, "ranks of one sequence-parallel group"),
    "an autograd function on logits": (_own_function, "torch.autograd.Function"),
}


def refusals(rank: int, names: list[str]) -> dict[str, str]:
    found = {}
    for name in names:
        fabric, module = launched(2, {"sp_size": 2}), GPT()
        model, optimizer = fabric.setup(module, sgd(module))
        with pytest.raises((UlyssesError, NotImplementedError)) as caught:
            LOOPS[name][0](fabric, model, optimizer)
        found[name] = str(caught.value)
        fabric.strategy.close()
    return found


@pytest.mark.parametrize("name", LOOPS)
def test_loops(pool: ProcessPool, name: str) -> None:
    for found in pool.run(refusals, [name], world_size=2):
        assert LOOPS[name][1] in found[name], found[name]


def set_up(rank: int, kind: type[nn.Module], optimizers: int) -> str:
    fabric, module = launched(2, {"sp_size": 2}), kind()
    try:
        model, *_ = fabric.setup(module, *(sgd(module) for _ in range(optimizers)))
        model(ROWS[:, :-1])
    except UlyssesError as error:
        return str(error)
    finally:
        fabric.strategy.close()
    return ""


@pytest.mark.parametrize(
    ("kind", "optimizers", "text"),
    [(Mixing, 1, ""), (Plain, 1, "Plain to split at its blocks"), (GPT, 2, "2 optimizers in fabric.setup")],
)
def test_modules(pool: ProcessPool, kind: type[nn.Module], optimizers: int, text: str) -> None:
    for found in pool.run(set_up, kind, optimizers, world_size=2):
        # What lies between two blocks runs on the whole sequence.
        assert (text in found) if text else not found, found


def test_a_strategy_of_the_other_loop_is_refused() -> None:
    from lightning_ulysses import UlyssesDeepSpeedStrategy

    with pytest.raises(ValueError, match="strategy"):
        L.Fabric(accelerator="cpu", devices=1, strategy=UlyssesDeepSpeedStrategy(sp_size=1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="strategy"):
        L.Trainer(accelerator="cpu", devices=1, strategy=UlyssesFabricStrategy(sp_size=1))  # type: ignore[arg-type]
