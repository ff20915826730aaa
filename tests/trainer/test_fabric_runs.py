"""Fabric around the steps: checkpoints in any world, dataloaders, random numbers, the example."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fabric_loops import launched, rows_loss
from models import VOCAB
from planned import GPT
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_ulysses import UlyssesFabricStrategy
from lightning_ulysses.testing import snapshot
from lightning_ulysses.testing.processes import ProcessPool

ROOT = Path(__file__).parents[2]
ROWS = torch.randint(0, VOCAB, (8, 2, 34), generator=torch.Generator().manual_seed(3))


class Dropped(nn.Module):
    """Draws in training."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt, self.dropout = GPT(), nn.Dropout(0.2)

    def forward(self, idx: Tensor) -> Tensor:
        return self.dropout(self.gpt(idx))


class Kept(nn.Module):
    """A layer with gradients that no optimizer steps."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt, self.kept = GPT(), nn.Linear(3, 2, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        return self.gpt(idx) + 0 * self.kept(torch.ones(3)).sum()


def build(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def steps(
    rank: int, world: tuple[int, int, int], kind: type[nn.Module], first: int, last: int, load: str, save: str
) -> tuple[dict[str, Tensor], dict[str, Any], list[float]]:
    """Steps ``first`` to ``last``, each on two micro-batches over all groups; what was left in the checkpoint."""
    processes, sp_size, stage = world
    fabric = launched(processes, {"sp_size": sp_size, "stage": stage})
    fabric.seed_everything(5)
    module = build(kind).train()
    if isinstance(module, Kept) and not load:
        nn.init.constant_(module.kept.weight, 3.0)
    stepped = [parameter for name, parameter in module.named_parameters() if "kept" not in name]
    model, optimizer = fabric.setup(module, torch.optim.Adam(stepped, lr=1e-2))
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": first}
    left = fabric.load(load, state) if load else {}
    dp_size, losses = fabric.strategy.mesh.dp_size, []
    assert state["step"] == first
    for step in range(first, last):
        mine = ROWS[2 * step + fabric.strategy.mesh.dp_rank : 2 * step + 2 : dp_size]
        for number, batch in enumerate(mine):
            with fabric.no_backward_sync(model, enabled=number + 1 < len(mine)):
                loss = rows_loss(model, batch)
                fabric.backward(loss / len(mine))
            losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
        state["step"] += 1
    if save:
        fabric.save(save, {**state, "note": "kept"})
    after = snapshot(module)
    fabric.strategy.close()
    return after, left, losses


WORLDS = [(2, 2, 2), (4, 2, 3), (1, 1, 1)]


def test_a_checkpoint_goes_on_in_any_world(pool: ProcessPool, tmp_path: Path) -> None:
    path = str(tmp_path / "step-2.ckpt")
    (whole, _, _), *_ = pool.run(steps, (2, 2, 2), GPT, 0, 4, "", "", world_size=2)
    pool.run(steps, (2, 2, 2), GPT, 0, 2, "", path, world_size=2)
    assert (tmp_path / "step-2.ckpt" / "ulysses_manifest.json").is_file()
    for world in WORLDS:
        for after, left, _ in pool.run(steps, world, GPT, 2, 4, path, "", world_size=world[0]):
            assert left["note"] == "kept" and "lightning_ulysses" not in left
            for name, value in whole.items():
                assert float((after[name] - value).norm() / value.norm()) <= 1e-5, (world, name)
    # Two steps are not four.
    ((early, _, _),) = pool.run(steps, (1, 1, 1), GPT, 0, 2, "", "", world_size=1)
    name = "lm_head.weight"
    assert float((early[name] - whole[name]).norm() / whole[name].norm()) > 1e-3


def test_what_no_optimizer_steps_is_saved_at_stage_3(pool: ProcessPool, tmp_path: Path) -> None:
    path = str(tmp_path / "step-1.ckpt")
    pool.run(steps, (2, 2, 3), Kept, 0, 1, "", path, world_size=2)
    for world in ((2, 2, 3), (1, 1, 2)):
        for after, _, _ in pool.run(steps, world, Kept, 1, 2, path, "", world_size=world[0]):
            assert after["kept.weight"].tolist() == [[3.0] * 3] * 2


def test_dropout_does_not_depend_on_processes_and_goes_on(pool: ProcessPool, tmp_path: Path) -> None:
    path = str(tmp_path / "step-1.ckpt")
    ((single, _, alone),) = pool.run(steps, (1, 1, 2), Dropped, 0, 2, "", "", world_size=1)
    for after, _, losses in pool.run(steps, (2, 2, 2), Dropped, 0, 2, "", "", world_size=2):
        assert losses == pytest.approx(alone, rel=1e-5)
        for name, value in single.items():
            assert float((after[name] - value).norm() / value.norm()) <= 1e-4, name
    pool.run(steps, (2, 2, 2), Dropped, 0, 1, "", path, world_size=2)
    for _, _, losses in pool.run(steps, (2, 2, 2), Dropped, 1, 2, path, "", world_size=2):
        assert losses == pytest.approx(alone[2:], rel=1e-5)
    assert len(set(alone)) == len(alone)


class Noisy(Dataset[Tensor]):
    """Numbers with noise, which a worker may draw."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index), float(torch.rand(()))])


class Stream(torch.utils.data.IterableDataset[Tensor]):
    """Of unknown length, longer on later groups."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        return iter(torch.arange(self.count).float())


def load(rank: int, workers: int) -> tuple[list[Any], list[Any], int, list[float]]:
    fabric = launched(4, {"sp_size": 2})
    fabric.seed_everything(1)
    # A worker that stays, since starting one takes seconds.
    plain = DataLoader(Noisy(), batch_size=1, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    loader = fabric.setup_dataloaders(plain)
    epochs = [torch.cat(list(loader)).tolist() for _ in range(2)]
    # A quick group has more to give.
    stream = fabric.setup_dataloaders(DataLoader(Stream(3 + fabric.strategy.mesh.dp_rank), batch_size=None))
    streamed = [float(each) for each in stream]
    fabric.strategy.close()
    return (*epochs, len(loader), streamed)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:Each epoch ends")
def test_groups_share_samples_and_their_ranks_share_draws(pool: ProcessPool, workers: int) -> None:
    found = pool.run(load, workers, world_size=4)
    assert found[0] == found[1] and found[2] == found[3]
    first, second = found[0][0], found[2][0]
    assert sorted(row[0] for row in first + second) == [0, 1, 2, 3, 4, 5] and found[0][2] == 3
    # Another order and other draws in each epoch, other draws in each group.
    assert found[0][0] != found[0][1]
    assert len({row[1] for row in first + second + found[0][1]}) == 9
    assert all(each[3] == [0.0, 1.0, 2.0] for each in found)


def run_example(rank: int) -> str:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import fabric_litgpt
    finally:
        sys.path.pop(0)
    printed, made = io.StringIO(), []

    def make(**settings: Any) -> UlyssesFabricStrategy:
        made.append(UlyssesFabricStrategy(**settings))
        return made[-1]

    with contextlib.redirect_stdout(printed), mock.patch.object(fabric_litgpt, "UlyssesFabricStrategy", make):
        fabric_litgpt.main()
    # The example's process ends here; this one goes on.
    made[0].close()
    return printed.getvalue()


def example_alone() -> list[float]:
    """The loop of the example on one process, with another strategy."""
    import lightning as L

    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import fabric_litgpt as example
    finally:
        sys.path.pop(0)
    fabric = L.Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    from unittest import mock

    with mock.patch.object(fabric, "save"):
        return example.run(fabric, example.Train(), Path())


def test_the_example_of_a_pretraining_script(pool: ProcessPool) -> None:
    printed, _ = pool.run(run_example, world_size=2)
    alone = example_alone()
    lines = printed.splitlines()
    assert lines[-1] == f"loss {alone[-1]:.3f} after {len(alone)} steps", printed
    assert alone[-1] < 0.7 * alone[0] and sum(line.startswith("step ") for line in lines) == 2
