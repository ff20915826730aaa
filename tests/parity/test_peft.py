"""Adapters of peft around a transformers model: LoRA is exact, adapters that lengthen the sequence are refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import BOUND, Keep, fit_broken, no_shift
from lightning.pytorch.callbacks import ModelCheckpoint
from models import LlamaModule, count_targets, token_batch
from nightly import mostly
from torch import Tensor

from lightning_ulysses import UlyssesError
from lightning_ulysses.export import load_weights
from lightning_ulysses.testing import SplitRun, compare, fit_rank, fit_single, fit_split, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool

BATCHES = [token_batch(seed, 33, 2, "uneven") for seed in range(2)]
ACCUMULATE: dict[str, Any] = {"accumulate_grad_batches": 2}


class Adapted(LlamaModule):
    """A user's module around ``get_peft_model``."""

    def __init__(self, only_adapters: bool = True, late: bool = False, saved: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.only_adapters, self.saved, self.adapted = only_adapters, saved, False
        if not late:
            self.configure_model()

    def configure_model(self) -> None:
        from peft import LoraConfig, get_peft_model

        if self.adapted:
            return
        self.adapted = True
        torch.manual_seed(5)
        config: Any = LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "v_proj", "down_proj"],
            modules_to_save=["lm_head"] if self.saved else None,
            # Both factors at random: the usual start, B = 0, has no gradient for A.
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        self.model = get_peft_model(self.model, config)
        if not self.only_adapters:
            self.model.requires_grad_(True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


@pytest.mark.parametrize("stage", mostly([2, 3], [3]))
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"only_adapters": False},
        {"call": "keywords", "late": True},
        {"saved": True},
    ],
    ids=["adapters", "everything", "configure_model", "whole head"],
)
def test_lora(pool: ProcessPool, stage: int, kwargs: dict[str, Any]) -> None:
    make = partial(Adapted, **kwargs)
    reference = fit_single(partial(Adapted, **{**kwargs, "late": False}), [BATCHES], count_targets)
    frozen = [name for name, value in reference.before.items() if torch.equal(value, reference.after[name])]
    assert bool(frozen) == kwargs.get("only_adapters", True) and reference.step().norm() > 1e-3
    for result in fit_split(pool, make, BATCHES, SplitRun(2, 2, {"stage": stage}, ACCUMULATE)):
        assert compare(result, reference).largest <= BOUND, compare(result, reference)
        assert all(torch.equal(result.before[name], result.after[name]) for name in frozen)


def test_without_the_shift_it_is_wrong(pool: ProcessPool) -> None:
    make = partial(Adapted, call="keywords")
    reference = fit_single(make, [BATCHES], count_targets)
    run = SplitRun(2, 2, {"targets": "shift_labels", "check_model": False}, ACCUMULATE)
    target = "lightning_ulysses.interceptors.transformers.model_inputs.shifted_labels"
    result = pool.run(fit_broken, make, BATCHES, run, target, no_shift, world_size=2)[0]
    assert compare(result, reference).largest > 100 * BOUND


def resumed(rank: int, folder: str, stage: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Four batches in one go, and the same with a stop in the middle."""
    batches = [token_batch(seed, 33, 1, "uneven") for seed in range(4)]
    ends = []
    for stop in (False, True):
        keep = Keep()
        run = SplitRun(2, 2, {"stage": stage})
        make = partial(Adapted, lr=0.5)
        if stop:
            first = SplitRun(2, 2, {"stage": stage}, {"max_steps": 2, "enable_checkpointing": True})
            saver = ModelCheckpoint(dirpath=folder, filename="middle", every_n_train_steps=2)
            split_trainer(first, [saver]).fit(make(), split_loader(batches, first, rank))
        path = f"{folder}/middle.ckpt" if stop else None
        split_trainer(run, [keep]).fit(make(), split_loader(batches, run, rank), ckpt_path=path)
        ends.append(keep.after)
    return ends[0], ends[1]


@pytest.mark.parametrize("stage", mostly([2, 3], [3]))
def test_resume_and_export(pool: ProcessPool, tmp_path: Path, stage: int) -> None:
    straight, stopped = pool.run(resumed, str(tmp_path), stage, world_size=2)[0]
    for name, value in straight.items():
        assert torch.equal(value, stopped[name]), name
    weights = load_weights(str(tmp_path / "middle.ckpt"))
    module = Adapted()
    fresh = {name: value.clone() for name, value in module.state_dict().items()}
    module.load_state_dict(weights, strict=True)
    moved = {name for name, value in weights.items() if not torch.equal(value, fresh[name])}
    assert moved == {name for name in fresh if "lora_" in name}


class Prompted(LlamaModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        import peft

        config: Any = getattr(peft, kind)(num_virtual_tokens=3, task_type="CAUSAL_LM")
        self.model = peft.get_peft_model(self.model, config)


def refusal(rank: int, kind: str) -> str:
    with pytest.raises(UlyssesError) as caught:
        fit_rank(rank, partial(Prompted, kind), BATCHES, SplitRun())
    return str(caught.value)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_virtual_tokens_are_refused(pool: ProcessPool, kind: str) -> None:
    for text in pool.run(refusal, kind, world_size=2):
        assert "PeftModelForCausalLM" in text and "virtual tokens" in text and "LoRA" in text
