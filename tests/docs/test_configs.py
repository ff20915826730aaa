"""The configurations that ship, and the module and data that they name."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from nightly import sampled
from snippet_names import chats, save_model

from lightning_ulysses import SequenceDataModule, TokenCountMonitor, UlyssesDeepSpeedStrategy
from lightning_ulysses.geometry.distance import largest
from lightning_ulysses.testing import SplitRun, StepRecorder, StepResult, split_trainer
from lightning_ulysses.testing.processes import ProcessPool

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
# Small enough to run, with rows that a function makes.
TASKS = ["dpo", "genomics", "proteins", "series", "video", "weather"]


def pretrain() -> Any:
    """The example's module, which is no part of the package."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import pretrain
    finally:
        sys.path.pop(0)
    return pretrain


def made(name: str, *args: str) -> LightningCLI:
    """What the program of a configuration would make of it, on a CPU."""
    config = ROOT / "configs" / name
    named = "\nmodel:\n  class_path" in config.read_text()
    classes: tuple[Any, Any] = (L.LightningModule if named else pretrain().CausalLM, SequenceDataModule)
    return LightningCLI(
        classes[0],
        L.LightningDataModule if named else classes[1],
        subclass_mode_model=named,
        subclass_mode_data=True,
        save_config_callback=None,
        auto_configure_optimizers=False,
        run=False,
        # The only change: this machine need not have their GPUs.
        args=["--config", str(config), "--trainer.accelerator", "cpu", *args],
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_can_be_made(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "a"}\n')
    cli = made(name)
    strategy = cli.trainer.strategy
    assert isinstance(strategy, UlyssesDeepSpeedStrategy)
    assert isinstance(cli.datamodule, SequenceDataModule) or name.removesuffix("_cpu.yaml") in TASKS
    assert cli.trainer.num_devices % int(strategy.ulysses.sp_size) == 0
    assert any(isinstance(callback, TokenCountMonitor) for callback in cli.trainer.callbacks)  # type: ignore[attr-defined]
    if name.endswith("_8gpu.yaml"):
        assert cli.trainer.num_devices == 8 and strategy.zero_stage_3 and strategy.config["zero_optimization"]


def run_task(rank: int, task: str, devices: int) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Losses of the first and the third step, and the weights after it."""
    sys.path.insert(0, str(ROOT / "examples"))
    # Lightning's sampler would shuffle on two processes, and on one it is not there.
    quiet = {"max_epochs": 1, "limit_train_batches": 3, "enable_progress_bar": False, "use_distributed_sampler": False}
    args = [f"--trainer.{key}={value}" for key, value in quiet.items()]
    args += [f"--trainer.devices={devices}", *([] if devices > 1 else ["--trainer.strategy=auto"])]
    argv, sys.argv = sys.argv, sys.argv[:1]
    try:
        with redirect_stdout(StringIO()):
            cli = made(f"{task}_cpu.yaml", "--trainer.callbacks=[]", *args)
            losses = Losses()
            cli.trainer.callbacks.append(losses)  # type: ignore[attr-defined]
            cli.trainer.fit(cli.model, cli.datamodule)
    finally:
        sys.argv = argv
        sys.path.pop(0)
    return losses.seen[0], losses.seen[-1], {name: value.detach() for name, value in cli.model.named_parameters()}


class Losses(L.Callback):
    """What a module logged."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.seen.append(float(trainer.callback_metrics["loss"]))


@pytest.mark.parametrize("task", sampled(TASKS, 6, ("weather", "dpo")))
def test_a_task_trains_as_in_one_process(pool: ProcessPool, task: str) -> None:
    results = pool.run(run_task, task, 2, world_size=2)
    ((first, last, weights),) = pool.run(run_task, task, 1, world_size=1)
    if task == "series":
        # Its masks are drawn in the step, and one process draws others: `test_examples` compares it.
        assert results[0][:2] == results[1][:2]
        return
    assert last < first
    for begin, end, found in results:
        assert begin == pytest.approx(first, rel=1e-5)
        # AdamW moves by the sign of gradients near 0.
        assert end == pytest.approx(last, rel=1e-2)
        # Biases that begin with zeros and get no gradient are the same zeros.
        distances = ((found[name] - value).norm() / value.norm().clamp_min(1e-9) for name, value in weights.items())
        assert largest(map(float, distances)) < 2e-2


def finetune(rank: int, model: str, train: str, cache: str, lora: dict[str, Any] | None = None) -> StepResult:
    module = pretrain().CausalLM(from_pretrained=model, lora=lora, gradient_checkpointing=True, warmup_steps=0)
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


def test_adapters_alone_are_trained_under_zero_3(pool: ProcessPool, tmp_path: Path) -> None:
    """The parts of the configuration with LoRA."""
    save_model(tmp_path / "model")
    paths = str(tmp_path / "model"), chats(tmp_path), str(tmp_path / "cache")
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    for result in pool.run(finetune, *paths, lora, world_size=2):
        moved = {name for name, value in result.after.items() if not torch.equal(value, result.before[name])}
        assert moved and all("lora_" in name for name in moved)
        assert any("lora_" not in name for name in result.after)
