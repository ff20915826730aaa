"""Every entry point of the Trainer, under the strategy."""

from __future__ import annotations

from itertools import product
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from models import LlamaModule, count_targets, hand_written, llama, token_batch
from nightly import mostly
from torch.nn.functional import scaled_dot_product_attention as early_bound
from torch.utils.data import DataLoader

from lightning_ulysses import TokenCountMonitor, UlyssesDeepSpeedStrategy, gather_sequence
from lightning_ulysses.testing import QUIET, SplitRun, compare, fit_single, fit_split, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool
from lightning_ulysses.upstream import deepspeed as upstream_deepspeed

LENGTHS = (33, 20, 27)


def batches(labels: str = "uneven") -> list[dict[str, torch.Tensor]]:
    return [token_batch(seed, length, 2, labels) for seed, length in enumerate(LENGTHS)]


def exact_loss(module: LlamaModule, data: list[Any]) -> float:
    with torch.no_grad():
        full = [batch for batch in data if count_targets(batch)]
        parts = [(count_targets(batch), float(module.training_step(batch, 0))) for batch in full]
    return sum(n * loss for n, loss in parts) / sum(n for n, _ in parts)


def evaluate(rank: int, run: SplitRun) -> dict[str, Any]:
    module = LlamaModule()
    trainer = split_trainer(run, [TokenCountMonitor()])
    loader = split_loader([*batches(), token_batch(9, 32, 1, "none")], run, rank)
    found: dict[str, Any] = {}
    found |= {name: float(value) for name, value in trainer.validate(module, loader, verbose=False)[0].items()}
    found |= {name: float(value) for name, value in trainer.test(module, loader, verbose=False)[0].items()}
    found["predictions"] = trainer.predict(module, loader)
    return found


@pytest.mark.parametrize("run", mostly([SplitRun(), SplitRun(4, 2), SplitRun(2, 2, {"stage": 3})], [SplitRun()]))
def test_evaluation_is_exact_and_predictions_come_back_whole(pool: ProcessPool, run: SplitRun) -> None:
    data = [*batches(), token_batch(9, 32, 1, "none")]
    module = LlamaModule()
    wanted = exact_loss(module, data)
    for rank, found in enumerate(pool.run(evaluate, run, world_size=run.world_size)):
        assert found["validate/loss"] == pytest.approx(wanted, rel=1e-5)
        assert found["test/loss"] == pytest.approx(wanted, rel=1e-5)
        mine = data[rank // run.sp_size :: run.world_size // run.sp_size]
        for batch, prediction in zip(mine, found["predictions"], strict=True):
            with torch.no_grad():
                logits = module.model(input_ids=batch["input_ids"]).logits
            torch.testing.assert_close(prediction["logits"], logits, atol=1e-5, rtol=1e-4)
            assert torch.equal(prediction["best"], logits.argmax(-1))
            assert prediction["name"] == "llama"


class Watcher(L.Callback):
    """Collects what a fit logged."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def fit_with_validation(rank: int, stage: int) -> dict[str, Any]:
    run = SplitRun(2, 2, {"stage": stage}, {"num_sanity_val_steps": 2, "val_check_interval": 2})
    watcher = Watcher()
    trainer = split_trainer(run, [TokenCountMonitor(), watcher])
    module = LlamaModule(lr=0.1)
    loader = split_loader(batches(), run, rank)
    trainer.fit(module, loader, loader)
    return {"losses": watcher.losses, **{name: float(value) for name, value in trainer.callback_metrics.items()}}


@pytest.mark.parametrize("stage", mostly([1, 2, 3], [1, 2]))
def test_fit_with_sanity_check_and_validation(pool: ProcessPool, stage: int) -> None:
    reference = fit_single(llama(lr=0.1), [[batch] for batch in batches()], count_targets)
    module = LlamaModule()
    two = fit_single(llama(lr=0.1), [[batch] for batch in batches()[:2]], count_targets).after
    module.load_state_dict({**module.state_dict(), **two})
    for found in pool.run(fit_with_validation, stage, world_size=2):
        assert found["losses"] == pytest.approx(list(reference.losses), rel=1e-5)
        assert found["train/loss"] == pytest.approx(reference.losses[-1], rel=1e-5)
        assert found["validate/loss"] == pytest.approx(exact_loss(module, batches()), rel=1e-5)
        assert found["tokens/global"] == 2 * LENGTHS[-1]
        assert found["throughput/tokens_per_sec"] > 0


def fit_twice(rank: int, stage: int, same_trainer: bool) -> list[dict[str, torch.Tensor]]:
    from lightning_ulysses.testing import snapshot

    class Keep(L.Callback):
        def __init__(self) -> None:
            self.after: dict[str, torch.Tensor] = {}

        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.after = snapshot(pl_module)

    run, kept = SplitRun(2, 2, {"stage": stage}), []
    module, keep = LlamaModule(lr=0.1), Keep()
    trainer = split_trainer(run, [keep])
    for attempt in range(2):
        if attempt and same_trainer:
            trainer.fit_loop.max_epochs = 2
        elif attempt:
            trainer = split_trainer(run, [keep])
        trainer.fit(module, split_loader(batches(), run, rank))
        kept.append(keep.after)
    return kept


@pytest.mark.parametrize(("stage", "same_trainer"), mostly(product((2, 3), (False, True)), [(2, False), (3, True)]))
def test_second_fit_in_the_same_process(pool: ProcessPool, stage: int, same_trainer: bool) -> None:
    steps = [[batch] for batch in batches()]
    once = fit_single(llama(lr=0.1), steps, count_targets)
    twice = fit_single(llama(lr=0.1), steps * 2, count_targets)
    first, second = pool.run(fit_twice, stage, same_trainer, world_size=2)[0]
    for wanted, found in ((once, first), (twice, second)):
        assert compare(type(once)(wanted.losses, wanted.grad_norms, wanted.before, found), wanted).step <= 1e-5


class Generating(LlamaModule):
    """Samples inside validation, as many modules do."""

    prompt = "whole"

    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        tokens = batch["input_ids"]
        if self.prompt == "cut":
            tokens = gather_sequence(tokens)[:, :8].contiguous()
        elif self.prompt == "own":
            tokens = torch.arange(1, 6)[None]
        self.texts = self.model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
        return super().validation_step(batch, batch_idx)


def generate(rank: int, stage: int, prompt: str) -> tuple[float, torch.Tensor]:
    run = SplitRun(2, 2, {"stage": stage})
    module = Generating()
    module.prompt = prompt
    trainer = split_trainer(run, [TokenCountMonitor()])
    loss = trainer.validate(module, split_loader(batches()[:1], run, rank), verbose=False)[0]["validate/loss"]
    return float(loss), module.texts


@pytest.mark.parametrize(("stage", "prompt"), [(2, "whole"), (2, "own"), (3, "cut")])
def test_generate_inside_validation_is_unsharded(pool: ProcessPool, stage: int, prompt: str) -> None:
    module, batch = LlamaModule(), batches()[0]
    module.eval()
    tokens = {"whole": batch["input_ids"], "cut": batch["input_ids"][:, :8], "own": torch.arange(1, 6)[None]}[prompt]
    wanted = module.model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for loss, texts in pool.run(generate, stage, prompt, world_size=2):
        assert torch.equal(texts, wanted)
        assert loss == pytest.approx(exact_loss(module, [batch]), rel=1e-5)


class Late(LlamaModule):
    """Builds the model in ``configure_model``, where ZeRO-3 shards it as it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.ready, self.model = self.model, None

    def configure_model(self) -> None:
        if self.model is None:
            from transformers import LlamaForCausalLM

            config, weights = self.ready.config, self.ready.state_dict()
            self.model = LlamaForCausalLM(config)
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters(list(self.model.parameters()), modifier_rank=0):
                self.model.load_state_dict(weights)
            self.ready = None


@pytest.mark.parametrize("stage", mostly([2, 3], [2]))
def test_configure_model(pool: ProcessPool, stage: int) -> None:
    reference = fit_single(llama(), [batches()], count_targets)
    run = SplitRun(strategy={"stage": stage}, trainer={"accumulate_grad_batches": 3})
    for result in fit_split(pool, Late, batches(), run):
        assert compare(result, reference).largest <= 1e-5


def restore(rank: int) -> list[str]:
    """What was not replaced while a Trainer ran, and what was not put back."""
    from deepspeed.runtime.activation_checkpointing import checkpointing
    from torch.nn.attention import flex_attention, varlen
    from transformers import GenerationMixin
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    class Early(LlamaModule):
        attend = staticmethod(early_bound)

    def seen() -> list[Any]:
        registered = [
            table._global_mapping[key]
            for table in (AttentionInterface, AttentionMaskInterface)
            for key in ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
        ]
        registered += [AttentionInterface.get_interface, AttentionMaskInterface._global_mapping["eager"]]
        functions = [F.linear, F.scaled_dot_product_attention, F.multi_head_attention_forward]
        functions += [varlen.varlen_attn, flex_attention.flex_attention, GenerationMixin.generate]
        functions += [getattr(checkpointing, name) for name in upstream_deepspeed._EMPTYING]
        return [*functions, early_bound, vars(Early)["attend"], torch.backends.mha.get_fastpath_enabled(), *registered]

    class Peek(L.Callback):
        def __init__(self) -> None:
            self.inside: list[Any] = []

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.inside = seen()

    # ZeRO-3, under which DeepSpeed replaces a function of its own.
    before, run, peek = seen(), SplitRun(strategy={"stage": 3}), Peek()
    module = Early()
    split_trainer(run, [peek]).fit(module, split_loader(batches(), run, rank))
    same = [a for a, b in zip(before, peek.inside, strict=True) if a is b]
    changed = [a for a, b in zip(before, seen(), strict=True) if a is not b]
    with pytest.raises(ZeroDivisionError):
        split_trainer(run).fit(Failing(), split_loader(batches(), run, rank))
    changed_by_failure = [a for a, b in zip(before, seen(), strict=True) if a is not b]
    hooks = [hook for hook in module.model._forward_pre_hooks.values() if "lightning_ulysses" in hook.__module__]
    return [str(each) for each in (*same, *changed, *changed_by_failure, *hooks)]


class Failing(LlamaModule):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        raise ZeroDivisionError


def test_teardown_restores_every_patched_function(pool: ProcessPool) -> None:
    assert pool.run(restore, world_size=2) == [[], []]


def short_name(rank: int, name: str) -> list[Any]:
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=name, max_steps=1, **QUIET)
    trainer.fit(LlamaModule(), DataLoader(batches(), batch_size=None))
    strategy = trainer.strategy
    assert isinstance(strategy, UlyssesDeepSpeedStrategy)
    zero = strategy.config["zero_optimization"]
    return [zero["stage"], strategy.mesh.sp_size, "offload_param" in zero]


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("ulysses_deepspeed", 2),
        pytest.param("ulysses_deepspeed_stage_1", 1, marks=pytest.mark.nightly),
        pytest.param("ulysses_deepspeed_stage_2", 2, marks=pytest.mark.nightly),
        ("ulysses_deepspeed_stage_3", 3),
        ("ulysses_deepspeed_stage_3_offload", 3),
    ],
)
def test_registered_names(pool: ProcessPool, name: str, stage: int) -> None:
    assert pool.run(short_name, name, world_size=2)[0] == [stage, 2, name.endswith("offload")]


def test_hand_written_model_is_plain_without_a_trainer() -> None:
    module = hand_written(attention="explicit")()
    x = torch.arange(10)[None]
    assert module(x).shape == (1, 10, 61)
