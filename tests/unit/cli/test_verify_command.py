"""`lightning-ulysses verify`, and scripts that call `verify_parity` themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ulysses.cli.main import _parser as parser
from lightning_ulysses.cli.main import main
from lightning_ulysses.cli.verify import load_config

PROGRAM = """
import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_ulysses import sequence_positions
from lightning_ulysses.verification import verify_parity


class GPT(L.LightningModule):
    def __init__(self, width: int = 32, lr: float = 0.1, arange: bool = False):
        super().__init__()
        self.embed, self.place = nn.Embedding(61, width), nn.Embedding(256, width)
        self.qkv, self.head = nn.Linear(width, 3 * width), nn.Linear(width, 61)
        self.arange, self.lr = arange, lr

    def forward(self, x):
        h = self.embed(x) + self.place(torch.arange(x.shape[1]) if self.arange else sequence_positions(x))
        q, k, v = self.qkv(h).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return self.head(h + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def training_step(self, batch, batch_idx):
        print("user code prints")
        return F.cross_entropy(self(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Data(L.LightningDataModule):
    def setup(self, stage):
        tokens = torch.randint(0, 61, (8, 33), generator=torch.Generator().manual_seed(0))
        self.rows = [{"tokens": row, "labels": row.roll(-1)} for row in tokens]

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=2)


def main():
    data = Data()
    data.setup("fit")
    print(verify_parity(GPT(), next(iter(data.train_dataloader())), strategy={"sequence_dims": {"tokens": 1}}))
"""
CONFIG = """
seed_everything: 1
trainer:
  accelerator: cuda
  devices: 8
  strategy:
    class_path: lightning_ulysses.UlyssesDeepSpeedStrategy
    init_args: {sp_size: 8, stage: 3, targets: labels, sequence_dims: {tokens: 1}}
  callbacks:
    - class_path: lightning_ulysses.TokenCountMonitor
model:
  class_path: users_program.GPT
  init_args: {lr: 1e-3, arange: false}
data:
  class_path: users_program.Data
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "users_program.py").write_text(PROGRAM)
    (tmp_path / "my.yaml").write_text(CONFIG)
    (tmp_path / "wrong.yaml").write_text(CONFIG.replace("arange: false", "arange: true"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    # Another test's.
    sys.modules.pop("users_program", None)
    return tmp_path


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=240)


VERIFY = ("-m", "lightning_ulysses.cli.main", "verify", "--config")


@pytest.mark.processes
def test_command_on_a_right_module(program: Path) -> None:
    found = call(program, *VERIFY, "my.yaml", "--steps", "2")
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "EXACT: every difference is at most 0.0001"
    assert "loss, batch 2" in found.stdout and "user code prints" not in found.stdout


@pytest.mark.processes
def test_command_on_a_wrong_module(program: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--config", str(program / "wrong.yaml"), "--json"])
    assert ended.value.code == 1
    values = json.loads(capfd.readouterr().out)
    assert values["exact"] is False and values["loss"]["relative_error"] > 1e-3
    assert values["finding"]["kind"] == "positions" and values["finding"]["module"] == "place"
    assert "users_program.py:20: h = self.embed(x) + self.place(torch.arange(" in values["finding"]["line"]
    assert values["parameters"]["place.weight"] > 0.1


@pytest.mark.processes
def test_a_script_that_is_its_own_module(program: Path) -> None:
    (program / "guarded.py").write_text(f"{PROGRAM}\n\nif __name__ == '__main__':\n    main()\n")
    assert call(program, "guarded.py").stdout.splitlines()[-1].startswith("EXACT")
    (program / "unguarded.py").write_text(f"{PROGRAM}\n\nmain()\n")
    assert "put what your script runs under `if __name__ == '__main__':`" in call(program, "unguarded.py").stderr


def test_files_beside_the_config_shadow_no_library(program: Path) -> None:
    """Not even one that nothing has imported yet; the user's own modules are found all the same."""
    (program / "plistlib.py").write_text("raise SystemError('shadowed')")
    text = (program / "users_program.py").read_text()
    (program / "users_program.py").write_text(f"import plistlib\n{text}")
    sys.modules.pop("plistlib", None)
    module, *_ = load_config(parser().parse_args(["verify", "--config", str(program / "my.yaml")]))
    assert type(module).__name__ == "GPT" and Path(sys.modules["plistlib"].__file__ or "").parent != program


def test_config(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def load(name: str = "my.yaml", *options: str) -> Any:
        return load_config(parser().parse_args(["verify", "--config", str(program / name), *options]))

    def says(text: str, name: str, *options: str) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["verify", "--config", str(program / name), *options])
        printed = capsys.readouterr()
        assert ended.value.code == 2 and text in printed.err and not printed.out

    module, batches, settings = load("my.yaml", "--steps", "2")
    assert type(module).__name__ == "GPT" and module.lr == 1e-3
    assert len(batches) == 2 and batches[0]["tokens"].shape == (2, 33)
    assert settings == {"targets": "labels", "sequence_dims": {"tokens": 1}}
    again = load()[0]
    assert torch.equal(module.embed.weight, again.embed.weight)

    (program / "bare.yaml").write_text("model: {lr: 0.5}\ndata: {}\n")
    assert load("bare.yaml", "--model", "users_program.GPT", "--data", "users_program.Data")[0].lr == 0.5
    says("add --model your_file.YourClass", "bare.yaml")
    says("nowhere.yaml, which is no file", "nowhere.yaml")
    says("from which module or data cannot be made", "bare.yaml", "--model", "users_program.Nothing", "--data", "x.Y")
    says("4 batches from the train dataloader for steps=5", "my.yaml", "--steps", "5")
    (program / "empty.yaml").write_text("trainer: {}\n")
    says("empty.yaml without model", "empty.yaml")
    (program / "list.yaml").write_text("model: [\n")
    says("Expected a YAML file", "list.yaml")
