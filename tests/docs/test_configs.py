"""The configurations that ship, and the module and data that they name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from snippet_names import chats, save_model

from lightning_ulysses import SequenceDataModule, TokenCountMonitor, UlyssesDeepSpeedStrategy
from lightning_ulysses.testing import SplitRun, StepRecorder, StepResult, split_trainer
from lightning_ulysses.testing.processes import ProcessPool

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))


def pretrain() -> Any:
    """The example's module, which is no part of the package."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import pretrain
    finally:
        sys.path.pop(0)
    return pretrain


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_can_be_made(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "a"}\n')
    # The only change: this machine need not have their GPUs.
    args = ["--config", str(ROOT / "configs" / name), "--trainer.accelerator", "cpu"]
    cli = LightningCLI(
        pretrain().CausalLM,
        SequenceDataModule,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        run=False,
        args=args,
    )
    strategy = cli.trainer.strategy
    assert isinstance(strategy, UlyssesDeepSpeedStrategy) and isinstance(cli.datamodule, SequenceDataModule)
    assert cli.trainer.num_devices % int(strategy.ulysses.sp_size) == 0
    assert any(isinstance(callback, TokenCountMonitor) for callback in cli.trainer.callbacks)  # type: ignore[attr-defined]
    if name != "demo_cpu.yaml":
        assert cli.trainer.num_devices == 8 and strategy.zero_stage_3 and strategy.config["zero_optimization"]


def finetune(rank: int, model: str, train: str, cache: str) -> StepResult:
    module = pretrain().CausalLM(from_pretrained=model, gradient_checkpointing=True, warmup_steps=0)
    data = SequenceDataModule(train, model, 128, cache_dir=cache)
    recorder = StepRecorder()
    run = SplitRun(2, 2, {"stage": 3}, {"use_distributed_sampler": True})
    split_trainer(run, [recorder]).fit(module, datamodule=data)
    return recorder.result()


def test_a_pretrained_model_and_chats_under_zero_3(pool: ProcessPool, tmp_path: Path) -> None:
    """The parts of the fine-tuning configuration, on a model small enough for a CPU."""
    from transformers import AutoModelForCausalLM

    save_model(tmp_path / "model")
    paths = str(tmp_path / "model"), chats(tmp_path), str(tmp_path / "cache")
    results = pool.run(finetune, *paths, world_size=2)
    data = SequenceDataModule(paths[1], paths[0], 128, cache_dir=paths[2])
    data.setup("fit")
    (batch,) = data.train_dataloader()
    model = AutoModelForCausalLM.from_pretrained(paths[0])
    with torch.no_grad():
        alone = float(model(**batch, use_cache=False).loss)
    for result in results:
        assert result.losses == pytest.approx([alone], rel=1e-5)
        assert result.step().norm() > 1e-2
        for name, value in model.named_parameters():
            torch.testing.assert_close(result.before[f"model.{name}"], value)
