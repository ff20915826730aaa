"""What a step in the sandbox does to the user's module is undone."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_ulysses.checks.trial.sandbox import sandbox, state_kept


@dataclass
class Meter:
    """Keeps a running mean, as many projects do."""

    count: int = 0
    values: list[float] = field(default_factory=list)

    def update(self, value: float) -> None:
        self.count += 1
        self.values.append(value)


class Stateful(LightningModule):
    """Writes to state of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
        self.teacher = nn.Linear(2, 2, bias=False).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(1))
        self.running = torch.zeros(1)
        self.steps, self.fails = 0, False
        self.kept: dict[str, list[float]] = {"losses": []}
        self.meter, self.named = Meter(), {"meter": Meter()}
        self.recent: deque[float] = deque(maxlen=3)
        self.counter: Counter[str] = Counter()
        self.groups: defaultdict[str, list[int]] = defaultdict(list)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.layer(batch).mean()
        self.seen += 1
        self.running += 1
        self.steps += 1
        self.kept["losses"].append(1.0)
        self.meter.update(1.0)
        self.named["meter"].update(1.0)
        self.recent.append(1.0)
        self.counter["step"] += 1
        self.groups["step"].append(1)
        self.new = 1
        self.other.requires_grad_(False)
        self.other.eval()
        self.teacher.weight.data.mul_(0.5)
        self.log("loss", loss / (not self.fails or 1 // 0))
        return loss


def state(module: Stateful) -> dict[str, Any]:
    names = ["seen", "running", "steps", "kept", "meter", "named", "recent", "counter", "groups"]
    found = {name: copy.deepcopy(getattr(module, name)) for name in names}
    found["flags"] = [parameter.requires_grad for parameter in module.parameters()]
    found["teacher"] = module.teacher.weight.sum().item()
    found["modes"] = [each.training for each in module.modules()]
    return {**found, "new": hasattr(module, "new")}


def test_state_of_every_kind_is_put_back() -> None:
    module, batch = Stateful(), torch.ones(1, 2)
    before, meter = state(module), module.meter
    with state_kept(module), sandbox(module, torch.device("cpu")):
        module.training_step(batch, 0)
        inside = state(module)
    assert state(module) == before and module.meter is meter
    assert all(inside[name] != before[name] for name in before)


def test_without_the_sandbox_nothing_is_put_back() -> None:
    module = Stateful()
    module.log = lambda *args: None  # type: ignore[method-assign]
    before = state(module)
    module.training_step(torch.ones(1, 2), 0)
    after = state(module)
    assert all(after[name] != before[name] for name in before)


def test_a_step_that_fails_leaves_nothing_either() -> None:
    module = Stateful()
    before = state(module)
    module.fails = True
    with pytest.raises(ZeroDivisionError), state_kept(module), sandbox(module, torch.device("cpu")):
        module.training_step(torch.ones(1, 2), 0)
    assert state(module) == before


@pytest.mark.parametrize("write", ["open", "path", "torch"])
def test_files_are_not_written(tmp_path: Path, write: str) -> None:
    """What a step writes cannot be taken back: it is not tried."""
    file = tmp_path / "predictions.csv"
    file.write_text("kept")

    def step() -> None:
        assert file.read_text() == "kept"
        if write == "open":
            open(file, "a").write("twice")  # noqa: SIM115
        elif write == "path":
            file.write_text("other")
        else:
            torch.save(torch.zeros(1), file)

    with sandbox(nn.Linear(1, 1), torch.device("cpu")), pytest.raises(OSError, match="a step that"):
        step()
    assert file.read_text() == "kept"
    file.write_text("again")


def test_what_is_zero_is_not_inside() -> None:
    module = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2).requires_grad_(False)])
    for parameter in (module[0].weight, module[1].weight):
        # Of other strides than those of a new tensor.
        parameter.data = torch.zeros(3, 2).t()
    before = [parameter.clone() for parameter in module.parameters()]
    with sandbox(module, torch.device("cpu")):
        inside = [bool(parameter.any()) for parameter in module.parameters()]
        assert torch.equal(module[0].bias, before[1])
    assert inside == [True, True, False, True]
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), before, strict=True))
