"""Save, resume, validate from a checkpoint, and export."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from exact import Keep
from lightning.pytorch.callbacks import ModelCheckpoint
from models import VOCAB, LlamaModule, count_targets, llama, token_batch
from nightly import mostly
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_ulysses import TokenCountMonitor
from lightning_ulysses.checkpoints.manifest import NAME
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.export import export_weights, load_weights
from lightning_ulysses.testing import SplitRun, StepResult, compare, fit_single, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool


class Augmented(Dataset[dict[str, Tensor]]):
    """Draws its tokens at random each time, as augmentation does."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(0, VOCAB, (1, 33))
        return {"input_ids": tokens, "labels": tokens}


def interrupted(rank: int, folder: str, stage: int, stop: bool) -> dict[str, Tensor]:
    L.seed_everything(7, verbose=False)
    keep = Keep()
    run = SplitRun(2, 2, {"stage": stage}, {"accumulate_grad_batches": 2, "max_epochs": 2})
    if stop:
        saver = ModelCheckpoint(dirpath=folder, filename="middle", every_n_train_steps=2, save_top_k=-1)
        first = SplitRun(2, 2, {"stage": stage}, {**run.trainer, "max_steps": 2, "enable_checkpointing": True})
        split_trainer(first, [saver]).fit(
            LlamaModule(lr=0.01, optimizer="adamw"), DataLoader(Augmented(), batch_size=None)
        )
        L.seed_everything(7, verbose=False)
    path = f"{folder}/middle.ckpt" if stop else None
    split_trainer(run, [keep]).fit(
        LlamaModule(lr=0.01, optimizer="adamw"), DataLoader(Augmented(), batch_size=None), ckpt_path=path
    )
    return keep.after


@pytest.mark.parametrize("stage", mostly([1, 2, 3], [1, 2]))
def test_resume_in_the_middle_of_an_epoch_is_identical(pool: ProcessPool, tmp_path: Path, stage: int) -> None:
    straight = pool.run(interrupted, str(tmp_path), stage, False, world_size=2)[0]
    resumed = pool.run(interrupted, str(tmp_path), stage, True, world_size=2)[0]
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name


def resize(rank: int, folder: str, stage: int, first: int, second: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    batches = [token_batch(seed, 33, 1, "uneven") for seed in range(8)]
    run = SplitRun(4, first, {"stage": stage}, {"max_steps": 2, "enable_checkpointing": True})
    saver, keep = ModelCheckpoint(dirpath=folder, filename="middle", every_n_train_steps=2), Keep()
    split_trainer(run, [saver, keep]).fit(LlamaModule(lr=0.1), split_loader(batches, run, rank))
    before = keep.before
    again = SplitRun(4, second, {"stage": stage})
    split_trainer(again, [keep]).fit(
        LlamaModule(lr=0.1), split_loader(batches, again, rank), ckpt_path=f"{folder}/middle.ckpt"
    )
    return before, keep.after


@pytest.mark.parametrize(
    ("stage", "first", "second"), mostly([(2, 2, 4), (3, 2, 4), (2, 4, 2)], [(3, 2, 4), (2, 4, 2)])
)
def test_resume_with_another_sp_size(pool: ProcessPool, tmp_path: Path, stage: int, first: int, second: int) -> None:
    batches = [token_batch(seed, 33, 1, "uneven") for seed in range(8)]
    used = 2 * 4 // first
    steps = [batches[i : i + 4 // first] for i in range(0, used, 4 // first)]
    steps += [batches[i : i + 4 // second] for i in range(used, 8, 4 // second)]
    reference = fit_single(llama(lr=0.1), steps, count_targets)
    before, after = pool.run(resize, str(tmp_path), stage, first, second, world_size=4)[0]
    found = StepResult(reference.losses, reference.grad_norms, before, after)
    assert compare(found, reference).step <= 1e-5


def train_and_validate(rank: int, folder: str, stage: int) -> tuple[float, float, float, dict[str, Tensor]]:
    batches = [token_batch(seed, 33, 2, "uneven") for seed in range(3)]
    run = SplitRun(2, 2, {"stage": stage}, {"enable_checkpointing": True})
    saver = ModelCheckpoint(dirpath=folder, filename="best", monitor="train/loss", every_n_train_steps=1)
    keep = Keep()
    trainer = split_trainer(run, [TokenCountMonitor(), saver, keep])
    trainer.fit(LlamaModule(lr=0.5), split_loader(batches, run, rank))
    assert saver.best_model_score is not None
    fresh = split_trainer(SplitRun(2, 2, {"stage": stage}), [TokenCountMonitor()])
    untrained = LlamaModule()
    path = saver.best_model_path
    value = fresh.validate(untrained, split_loader(batches, run, rank), ckpt_path=path, verbose=False)[0]
    return float(value["validate/loss"]), float(saver.best_model_score), path, keep.after  # type: ignore[return-value]


@pytest.mark.parametrize("stage", mostly([1, 2, 3], [1, 2]))
def test_validate_from_a_checkpoint_and_export_one_file(pool: ProcessPool, tmp_path: Path, stage: int) -> None:
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    results = pool.run(train_and_validate, str(tmp_path), stage, world_size=2)
    assert results[0][:3] == results[1][:3]
    value, _, path, _ = results[0]
    batches = [token_batch(seed, 33, 2, "uneven") for seed in range(3)]

    module = LlamaModule()
    module.load_state_dict(load_weights(path), strict=True)
    total = sum(count_targets(batch) for batch in batches)
    with torch.no_grad():
        wanted = sum(count_targets(b) * float(module.training_step(b, 0)) for b in batches) / total
    assert value == pytest.approx(wanted, rel=1e-5)

    export_weights(path, tmp_path / "weights.pt")
    assert set(torch.load(tmp_path / "weights.pt")) == set(module.state_dict())
    folder = tmp_path / "model"
    module.model.config.save_pretrained(folder)
    export_weights(path, folder / "model.safetensors", prefix="model.")
    assert set(load_file(folder / "model.safetensors")) == set(module.model.state_dict())
    loaded: Any = LlamaForCausalLM.from_pretrained(folder)
    tokens = batches[0]["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, module.model(tokens).logits)


def test_export_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UlyssesError, match="holds no sharded checkpoint"):
        load_weights(tmp_path)


class Tied(LlamaModule):
    def __init__(self) -> None:
        super().__init__()
        self.model.lm_head.weight = self.model.model.embed_tokens.weight


def save_tied(rank: int, path: str, stage: int) -> None:
    run = SplitRun(2, 2, {"stage": stage}, {"max_steps": 1})
    trainer = split_trainer(run)
    trainer.fit(Tied(), split_loader([token_batch(0, 33)], run, rank))
    trainer.save_checkpoint(path)


@pytest.mark.parametrize("stage", mostly([2, 3], [2]))
def test_tied_weights_are_written_once(pool: ProcessPool, tmp_path: Path, stage: int) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_model

    pool.run(save_tied, str(tmp_path / "tied.ckpt"), stage, world_size=2)
    weights = load_weights(tmp_path / "tied.ckpt")
    one, other = "model.model.embed_tokens.weight", "model.lm_head.weight"
    for name in ("weights.pt", "weights.safetensors"):
        export_weights(tmp_path / "tied.ckpt", tmp_path / name)
    loaded = torch.load(tmp_path / "weights.pt")
    assert loaded[one].data_ptr() == loaded[other].data_ptr()
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        assert set(weights) - set(file.keys()) in ({one}, {other})
    module = Tied()
    load_model(module, str(tmp_path / "weights.safetensors"))
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())


def test_loading_before_setup_is_refused(tmp_path: Path) -> None:
    trainer = split_trainer(SplitRun(1, 1))
    with pytest.raises(UlyssesError, match="before the strategy was set up"):
        trainer.strategy.load_checkpoint(tmp_path)


def without_manifest(rank: int, path: str) -> int:
    run = SplitRun(2, 2, {}, {"max_steps": 4})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        split_trainer(run).fit(LlamaModule(), split_loader([token_batch(0, 33)] * 4, run, rank), ckpt_path=path)
    return sum(f"has no {NAME}" in str(warning.message) for warning in caught)


def test_a_checkpoint_without_a_manifest_is_resumed_with_a_warning(pool: ProcessPool, tmp_path: Path) -> None:
    path = tmp_path / "old.ckpt"
    pool.run(save_two, str(path), world_size=2)
    (path / NAME).unlink()
    assert pool.run(without_manifest, str(path), world_size=2) == [1, 0]


def save_two(rank: int, path: str) -> None:
    run = SplitRun(2, 2, {}, {"max_steps": 2})
    trainer = split_trainer(run)
    trainer.fit(LlamaModule(), split_loader([token_batch(0, 33)] * 4, run, rank))
    trainer.save_checkpoint(path)
