"""The strategy from LightningCLI and YAML."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies.deepspeed import DeepSpeedStrategy
from models import HandWritten

from lightning_ulysses import UlyssesDeepSpeedStrategy
from lightning_ulysses.config import REGISTERED

STRATEGY = """
trainer:
  accelerator: cpu
  devices: 2
  strategy:
    class_path: lightning_ulysses.UlyssesDeepSpeedStrategy
    init_args: {sp_size: 2, stage: 3, offload_optimizer: true, sequence_dims: {x: 1, whole: null}}
"""


def test_yaml_builds_the_strategy(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(STRATEGY)
    cli = LightningCLI(HandWritten, run=False, args=["--config", str(tmp_path / "run.yaml")], save_config_callback=None)
    strategy = cli.trainer.strategy
    assert isinstance(strategy, UlyssesDeepSpeedStrategy)
    assert strategy.ulysses.sp_size == 2
    assert strategy.ulysses.rules.sequence_dims == {"x": 1, "whole": None}
    assert strategy.config["zero_optimization"]["stage"] == 3
    assert strategy.config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_every_argument_is_visible(tmp_path: Path) -> None:
    import inspect

    (tmp_path / "run.yaml").write_text(STRATEGY)
    out = io.StringIO()
    with pytest.raises(SystemExit), redirect_stdout(out):
        LightningCLI(HandWritten, run=False, args=["--config", str(tmp_path / "run.yaml"), "--print_config"])
    printed = yaml.safe_load(out.getvalue())["trainer"]["strategy"]["init_args"]
    expected = set(inspect.signature(DeepSpeedStrategy.__init__).parameters) - {"self"}
    own = {"sp_size", "dp_shard_size", "dp_replicate_size", "sequence_dims", "loss_weighting", "targets"}
    # Trainer and accelerator connector fill these in; the CLI leaves types that it cannot parse out.
    hidden = {"cluster_environment", "precision_plugin", "accelerator", "parallel_devices"}
    assert expected - hidden <= set(printed)
    assert own <= set(printed)
    assert printed["stage"] == 3

    out = io.StringIO()
    name = "lightning_ulysses.UlyssesDeepSpeedStrategy"
    with pytest.raises(SystemExit), redirect_stdout(out):
        LightningCLI(HandWritten, run=False, args=[f"--trainer.strategy.help={name}"])
    for argument in ("--trainer.strategy.sp_size", "--trainer.strategy.offload_parameters", "loss_weighting"):
        assert argument in out.getvalue()


def test_command_line_overrides_yaml(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(STRATEGY)
    arguments = ["--config", str(tmp_path / "run.yaml"), "--trainer.strategy.init_args.sp_size=auto"]
    cli = LightningCLI(HandWritten, run=False, args=arguments, save_config_callback=None)
    assert isinstance(cli.trainer.strategy, UlyssesDeepSpeedStrategy)
    assert cli.trainer.strategy.ulysses.sp_size == "auto"


@pytest.mark.parametrize("suffix", REGISTERED)
def test_registered_names_take_arguments(suffix: str, tmp_path: Path) -> None:
    name = f"ulysses_deepspeed{suffix}"
    (tmp_path / "run.yaml").write_text(f"trainer: {{strategy: {name}}}")
    flags = ["--trainer.accelerator=cpu", "--trainer.devices=2"]
    ways = (
        ["--config", str(tmp_path / "run.yaml")],
        ["--trainer.strategy", name],
        ["--trainer.strategy", name, "--trainer.strategy.sp_size", "2", "--trainer.strategy.offload_optimizer=true"],
        ["--config", str(tmp_path / "run.yaml"), "--trainer.strategy.sp_size=2"],
    )
    for place, line in enumerate(ways):
        cli = LightningCLI(HandWritten, run=False, args=[*line, *flags], save_config_callback=None)
        strategy = cli.trainer.strategy
        assert isinstance(strategy, UlyssesDeepSpeedStrategy)
        assert strategy.ulysses.sp_size == (2 if place > 1 else "auto")
        zero = strategy.config["zero_optimization"]
        assert zero["stage"] == REGISTERED[suffix]["stage"]
        offloads = place == 2 or "offload" in suffix
        assert ("offload_optimizer" in zero) == offloads and ("offload_param" in zero) == ("offload" in suffix)
    # A stage beside the name replaces the name's.
    line = ["--trainer.strategy", name, "--trainer.strategy.stage=3", *flags]
    cli = LightningCLI(HandWritten, run=False, args=line, save_config_callback=None)
    assert cli.trainer.strategy.config["zero_optimization"]["stage"] == 3
