"""Configurations, commands and shown output of the documents; the first program runs as a program."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
from documents import BLOCKS, LANGUAGES, ROOT, TEXTS, Block, blocks_of, of
from lightning.pytorch.cli import LightningCLI
from models import HandWritten
from snippet_names import PROGRAM
from torch.distributed.run import get_args_parser

import lightning_ulysses
from lightning_ulysses import UlyssesDeepSpeedStrategy
from lightning_ulysses.cli.main import _parser as command_line
from lightning_ulysses.geometry.split_plan import read_plan

MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = (ROOT / "pyproject.toml").read_text()


def test_blocks_are_found() -> None:
    text = "# A\n```python\nx = 1\n# no heading\n```\n\n## B\n~~~yaml\na: 1\n~~~\n"
    assert blocks_of("D", text) == [
        Block("D / A / 1", "python", "x = 1\n# no heading\n"),
        Block("D / B / 1", "yaml", "a: 1\n"),
    ]
    assert {block.language for block in BLOCKS} <= set(LANGUAGES), "a block in a language that nothing here checks"
    for language in LANGUAGES:
        assert of(language)


@pytest.mark.parametrize("block", of("yaml"))
def test_yaml(tmp_path: Path, block: Block) -> None:
    import yaml

    (tmp_path / "run.yaml").write_text(block.source)
    args = ["--config", str(tmp_path / "run.yaml"), "--trainer.accelerator=cpu"]
    cli = LightningCLI(HandWritten, run=False, args=args, save_config_callback=None, seed_everything_default=False)
    settings = yaml.safe_load(block.source)["trainer"]
    strategy = cli.trainer.strategy
    assert isinstance(strategy, UlyssesDeepSpeedStrategy)
    written = settings["strategy"]["init_args"]
    assert strategy.ulysses.sp_size == written.get("sp_size", "auto")
    assert strategy.ulysses.plan == read_plan(written.get("plan"))
    assert strategy.config["zero_optimization"]["stage"] == written.get("stage", 2)
    assert ("offload_optimizer" in strategy.config["zero_optimization"]) == written.get("offload_optimizer", False)
    for callback in settings.get("callbacks", []):
        kind = getattr(lightning_ulysses, callback["class_path"].rpartition(".")[2])
        assert any(isinstance(found, kind) for found in cli.trainer.callbacks)


def test_the_flags_of_the_first_page() -> None:
    (flags,) = re.findall(r"`(--trainer\.strategy=[^`]*)`", TEXTS["docs/index.md"])
    args = [*flags.split(), "--trainer.accelerator=cpu"]
    strategy = LightningCLI(HandWritten, run=False, args=args, save_config_callback=None).trainer.strategy
    assert isinstance(strategy, UlyssesDeepSpeedStrategy) and strategy.ulysses.sp_size == 4


def check_file(arguments: list[str]) -> None:
    """A file of this repository with its arguments; of a LightningCLI program, the config and the Trainer's flags."""
    assert (ROOT / arguments[0]).is_file(), arguments[0]
    for argument in arguments[1:]:
        name, is_flag, _ = argument.removeprefix("--trainer.").partition("=")
        if argument.startswith("--trainer.") and is_flag:
            assert name in inspect.signature(pl.Trainer).parameters, argument
        if argument.endswith(".yaml"):
            assert (ROOT / argument).is_file(), argument


def check_command(line: str) -> None:
    """A target of the Makefile, an install of this folder, a command of the package, or a run of a file in it."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    if not words:
        return
    program, *arguments = words
    if program == "srun":
        program, *arguments = [word for word in arguments if not word.startswith("--") or "kill-on" not in word]
    if program == "make":
        targets = set(re.findall(r"^(\w+):", MAKEFILE, re.MULTILINE))
        assert arguments and set(arguments) <= targets, line
    elif program == "pip":
        extra = re.fullmatch(r"\.(?:\[(\w+)\])?", arguments[1])
        assert arguments[0] == "install" and len(arguments) == 2 and extra, line
        assert extra[1] is None or re.search(rf"^{extra[1]} = \[", PROJECT, re.MULTILINE), line
    elif program == "lightning-ulysses":
        assert command_line().parse_args(arguments)
    elif program == "torchrun":
        given = get_args_parser().parse_args(arguments)
        check_file([given.training_script, *given.training_script_args])
    elif (program, arguments[0]) != ("python", "train.py"):
        assert program in ("python", ".venv/bin/pytest", ".venv/bin/python"), line
        check_file(arguments)


@pytest.mark.parametrize("block", of("sh"))
def test_commands(block: Block) -> None:
    for line in block.source.splitlines():
        check_command(line)


@pytest.mark.parametrize(
    "line",
    ["make nothing", "python no_such_file.py", "lightning-ulysses nothing", "torchrun --nothing 2 a.py", "rm -r /"],
)
def test_wrong_commands_are_found(line: str) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        check_command(line)


def test_slurm_script_has_as_many_tasks_as_the_configuration() -> None:
    import yaml

    (script,) = (block.source for block in BLOCKS if "#SBATCH" in block.source)
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script, re.MULTILINE))
    config = yaml.safe_load((ROOT / "configs" / "pretrain_8gpu.yaml").read_text())
    assert int(asked["ntasks-per-node"]) == config["trainer"]["devices"]
    assert f"--trainer.num_nodes={asked['nodes']}" in script


# What plans print is compared by the test of their page.
@pytest.mark.parametrize("block", [each for each in of("text") if "plans.md" not in str(each.id)])
def test_shown_output_has_the_lines_of_the_demo(block: Block) -> None:
    source = (ROOT / "examples" / "demo_summary.py").read_text()
    for line in block.source.splitlines():
        assert re.match(r"\S.{17} \S", line) and f'"{line[:19].strip()}"' in source, line


@pytest.mark.processes
def test_first_program(tmp_path: Path) -> None:
    """It prints what the commands below it say, and the same loss on two processes and on one."""
    (program,) = (block.source for block in BLOCKS if block.name == PROGRAM)
    (commands,) = (block.source for block in BLOCKS if block.name == PROGRAM[:-1] + "2")
    (tmp_path / "train.py").write_text(program)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    losses = []
    for line in commands.splitlines():
        command, _, shown = line.partition("  # ")
        _, *arguments = shlex.split(command)
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        (printed,) = re.findall(r"^loss .*$", done.stdout, re.MULTILINE)
        number = r"\d+\.\d+"
        assert re.sub(number, "", printed) == re.sub(number, "", shown)
        losses += [float(re.findall(number, text)[0]) for text in (printed, shown)]
        # What a first run shows must not look like a fault.
        assert "requires_grad" not in done.stderr
    # Other processors round otherwise; on one machine, four digits are the same.
    assert losses[0] == losses[2] and losses == pytest.approx([losses[0]] * 4, rel=1e-2)
