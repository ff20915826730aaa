"""What a plan refuses, what it leaves alone, and that it is gone with its strategy."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from lightning.pytorch.cli import LightningCLI
from models import count_targets, token_batch
from planned import Denoiser, LitModule, count_samples, denoiser, image_batch, lit, text_batches
from torch import Tensor

from lightning_ulysses import (
    TokenCountMonitor,
    UlyssesDeepSpeedStrategy,
    UlyssesError,
    gather_sequence,
    regions,
    unsharded,
)
from lightning_ulysses.context import SequenceContext
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.distance import largest
from lightning_ulysses.geometry.split_plan import read_plan
from lightning_ulysses.testing import (
    SplitRun,
    StepRecorder,
    StepResult,
    compare,
    fit_rank,
    fit_single,
    split_loader,
    split_trainer,
)
from lightning_ulysses.testing.processes import ProcessPool
from lightning_ulysses.verification import verify_parity

ROOT = Path(__file__).parents[2]
BLOCKS = {"transformer.h.*": {"x": 1, "cos": 1, "sin": 1}}
TEXT = text_batches(1)


@pytest.mark.parametrize(
    ("plan", "parts"),
    [
        ("lit", ["'lit'", "litgpt"]),
        (3, ["the value 3"]),
        ({"splits": BLOCKS}, ["'splits'"]),
        ({"join": {"lm_head": 1}}, ["nothing to split"]),
        ({"split": BLOCKS}, ["neither join nor whole"]),
        ({"split": BLOCKS, "join": {"lm_head": 1}, "whole": ["input_ids"]}, ["both join and whole"]),
        ({"split": {"h.*": ["x"]}, "join": {"lm_head": 1}}, ["split['h.*']=['x']"]),
        ({"split": {"h.*": {"x": "1"}}, "join": {"lm_head": 1}}, ["its dimension"]),
        ({"split": BLOCKS, "join": {"lm_head": None}}, ["join['lm_head']=None"]),
        ({"split": BLOCKS, "whole": "input_ids"}, ["as a list"]),
        ({"whole": {"h.*": {"x": 1}}, "join": {"lm_head": 1}}, ["nothing to split", "the batch is cut"]),
        ({"whole": {"h.*": 1}}, ["whole['h.*']=1", "its dimension"]),
        ({"whole": {"h.*": {"inputs": {"x": 1}, "outputs": "x"}}}, ["whole['h.*']='x'"]),
        ({"split": BLOCKS, "whole": {"x": None}, "join": {"lm_head": 1}}, ["both join and whole"]),
        ({"halo": {"h.*": {"x": 1}}}, ["halo['h.*']", "the dimension of the sequence"]),
        ({"halo": {"h.*": {"dim": 1, "padded": "left"}}}, ["padded='left'", "'before', 'both', 'after'"]),
    ],
)
def test_a_plan_that_contradicts_itself(plan: Any, parts: list[str]) -> None:
    with pytest.raises(UlyssesError) as caught:
        UlyssesDeepSpeedStrategy(plan=plan)
    assert [part for part in parts if part not in str(caught.value)] == [], caught.value


def test_padding_and_a_plan() -> None:
    with pytest.raises(UlyssesError, match="pad_to_multiple_of=4 with a plan"):
        UlyssesDeepSpeedStrategy(plan="litgpt", pad_to_multiple_of=4)


class Skips(LitModule):
    """Calls the blocks' forward past the module, or leaves the head out."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        h = self.gpt.transformer.wte(batch["input_ids"])
        cos, sin = self.gpt.cos[None, : h.shape[1]], self.gpt.sin[None, : h.shape[1]]
        for block in self.gpt.transformer.h:
            h = block.forward(h, cos, sin) if self.what == "split" else block(h, cos, sin)
        return h.square().mean()


def skips_split() -> Skips:
    return Skips("split")


def skips_join() -> Skips:
    return Skips("join")


class RowMeans(LitModule):
    """Averages rows, each over its own targets."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        y = batch["shift_labels"]
        each = F.cross_entropy(self.gpt(batch["input_ids"]).transpose(1, 2), y, reduction="none")
        return (each.sum(1) / (y != -100).sum(1).clamp(min=1)).mean()


def compiled() -> LitModule:
    module = LitModule(mixes=True)
    module.gpt.compile(backend="eager")
    return module


def plan(**changes: Any) -> dict[str, Any]:
    return {"plan": {"split": BLOCKS, "join": {"lm_head": 1}, **changes}}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"split": {"transformer.hh.*": {"x": 1}}}, ["split names 'transformer.hh.*'", "gpt.transformer.h.0"]),
        ({"join": {"head": 1}}, ["join names 'head'", "lm_head"]),
        ({"split": {"transformer.h.*": {"y": 1}}}, ["'y'", "['x', 'cos', 'sin', 'mask'"]),
        ({"local": ["transformer.h.*.cross"]}, ["local names 'transformer.h.*.cross'"]),
        ({"whole": {"transformer.h.*.cross": {"x": 1}}}, ["whole or halo names 'transformer.h.*.cross'"]),
        ({"whole": {"transformer.h.*": {"y": 1}}}, ["'y'", "['x', 'cos', 'sin', 'mask'"]),
    ],
)
def test_names_that_are_not_there(changes: Any, parts: list[str]) -> None:
    module, before = LitModule(), torch.utils.checkpoint.checkpoint
    context = SequenceContext(SequenceMesh(rank=0, world_size=2, sp_size=2, sp_rank=0, dp_size=1, dp_rank=0))
    with pytest.raises(UlyssesError) as caught:
        regions.install(context, module, read_plan(plan(**changes)["plan"]))
    assert [part for part in parts if part not in str(caught.value)] == [], caught.value
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.modules())
    assert torch.utils.checkpoint.checkpoint is before


REFUSED: dict[str, tuple[Any, list[Any], dict[str, Any], list[str]]] = {
    "no such output": (lit(), TEXT, plan(join={"lm_head": {"logits": 1}}), ["of type Tensor", "logits"]),
    "no dimension": (lit(), TEXT, plan(split={"transformer.h.*": {"x": 5}}), ["to have a dimension 5"]),
    "two lengths": (lit(), TEXT, plan(split={"transformer.h.*": {"x": 1, "cos": 2}}), ["one length S", "(1, 33, 8)"]),
    "joined elsewhere": (lit(), TEXT, plan(join={"lm_head": 2}), ["this rank's share", "61)", "along dimension 2"]),
    "split not reached": (skips_split, TEXT, plan(), ["none of the submodules that the plan splits"]),
    "join not reached": (skips_join, TEXT, plan(), ["ended before", "joins"]),
    "no such input of the batch": (
        lit(loss="given"),
        TEXT,
        {"plan": {"split": BLOCKS, "whole": ["tokens"]}},
        ["without any of ['tokens']", "'input_ids': (1, 33)"],
    ),
    "cumulative sum inside": (
        lit(mixes=True),
        TEXT,
        plan(),
        [
            "'gpt.transformer.h.1.mlp' (Scan)",
            "add {'whole': {'gpt.transformer.h.1.mlp': {'inputs': {'h': 1}, 'outputs': 1}}}",
        ],
    ),
    "a halo of what is no convolution": (
        lit(mixes=True),
        TEXT,
        plan(halo={"transformer.h.1.mlp": 1}),
        ["a halo of gpt.transformer.h.1.mlp (Scan)", "under whole"],
    ),
    "whole along another dimension": (
        lit(mixes=True),
        TEXT,
        plan(whole={"transformer.h.1.mlp": {"h": 2}}),
        ["h of gpt.transformer.h.1.mlp of shape (1, 17, 32)", "this rank's share, 17"],
    ),
    "cumulative sum inside of what is compiled": (compiled, TEXT, plan(), ["'gpt.transformer.h.1.mlp' (Scan)"]),
    "positions taken from a prefix": (
        lit(takes_prefix=True),
        TEXT,
        plan(split={"transformer.h.*": {"x": 1}}),
        ["'gpt.transformer.h.0.attn' (SelfAttention)", "sequence_positions(x)"],
    ),
    "no mean over the targets of slices": (
        RowMeans,
        [token_batch(1, 33, 2, "uneven")],
        {"plan": "litgpt_unjoined", "targets": "shift_labels"},
        ["no mean over tokens"],
    ),
    "a checkpoint of one's own": (lit(checkpoints="unknown"), TEXT, plan(), ["other means than the checkpoint"]),
    "self-attention called local": (denoiser(forgets_text=True), [image_batch(1)], {"plan": "diffusers"}, ["attn2"]),
    "noise of one's own": (denoiser(seed="rank"), [image_batch(1)], {"plan": "diffusers"}, ["computed differently"]),
}


def refused(rank: int, make: Any, batches: list[Any], run: SplitRun) -> UlyssesError:
    with pytest.raises(UlyssesError) as caught:
        fit_rank(rank, make, batches, run)
    return caught.value


@pytest.mark.parametrize("case", REFUSED)
def test_every_rank_refuses(pool: ProcessPool, case: str) -> None:
    make, batches, strategy, parts = REFUSED[case]
    for error in pool.run(refused, make, batches, SplitRun(strategy=strategy), world_size=2):
        assert [part for part in parts if part not in str(error)] == [], error


class Apart(Denoiser):
    """Draws noise from the default generator, whose seed differs over ranks; ``noise`` takes its place."""

    def __init__(self, noise: list[Tensor] | None = None) -> None:
        super().__init__()
        self.noise, self.drawn = list(noise or []), []

    def on_train_start(self) -> None:
        torch.manual_seed(100 + self.global_rank)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.drawn.append(self.noise.pop(0) if self.noise else torch.randn(batch["images"].shape))
        return super().training_step({**batch, "noise": self.drawn[-1]}, batch_idx)


def fit_drawing(rank: int, batches: list[Any], run: SplitRun) -> tuple[StepResult, list[Tensor]]:
    module, recorder = Apart(), StepRecorder()
    split_trainer(run, [recorder]).fit(module, split_loader(batches, run, rank))
    return recorder.result(), module.drawn


def test_a_group_draws_the_same_noise(pool: ProcessPool) -> None:
    run = SplitRun(2, 2, {"plan": "diffusers"}, {"accumulate_grad_batches": 2})
    batches = [image_batch(1), image_batch(2)]
    (result, drawn), (other, drawn_there) = pool.run(fit_drawing, batches, run, world_size=2)
    assert all(torch.equal(a, b) for a, b in zip(drawn, drawn_there, strict=True))
    assert not torch.equal(drawn[0], drawn[1])
    reference = fit_single(partial(Apart, drawn), [batches], count_samples)
    assert largest(compare(each, reference).largest for each in (result, other)) <= 1e-5


class Looking(LitModule):
    """Looks at its own slices in a validation step."""

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.gpt(batch["input_ids"])
        self.joined = gather_sequence(logits)
        self.labels = gather_sequence(batch["shift_labels"])
        with unsharded():
            self.plain = self.gpt(batch["input_ids"])
        return F.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten(), ignore_index=-100)


def evaluate(rank: int, name: str) -> tuple[list[Tensor], Tensor, float]:
    run = SplitRun(strategy={"plan": name})
    batches = [token_batch(seed, 33, 2, "uneven") for seed in range(2)]
    make = LitModule if name == "litgpt" else Looking
    trainer, module = split_trainer(run, [TokenCountMonitor()]), make()
    loader = split_loader(batches, run, rank)
    loss = trainer.validate(module, loader, verbose=False)[0]["validate/loss"]
    predicted: Any = trainer.predict(module, loader)
    if isinstance(module, Looking):
        assert torch.allclose(module.joined, module.plain, atol=1e-5)
        assert torch.equal(module.labels, F.pad(batches[1]["labels"][:, 1:], (0, 1), value=-100))
    with torch.no_grad():
        return predicted, module.gpt(batches[1]["input_ids"]), loss


@pytest.mark.parametrize("name", ["litgpt", "litgpt_unjoined"])
def test_evaluation_and_prediction_are_whole(pool: ProcessPool, name: str) -> None:
    module = LitModule()
    batches = [token_batch(seed, 33, 2, "uneven") for seed in range(2)]
    counts = [count_targets(batch) for batch in batches]
    with torch.no_grad():
        losses = [float(module.training_step(batch, 0)) for batch in batches]
    wanted = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    for predicted, after, loss in pool.run(evaluate, name, world_size=2):
        assert loss == pytest.approx(wanted, rel=1e-5)
        assert predicted[1].shape == (2, 33, 61) and torch.allclose(predicted[1], after, atol=1e-5)


def fit_and_look(rank: int) -> list[Any]:
    run, module = SplitRun(strategy={"plan": "diffusers"}), Denoiser()
    before = torch.utils.checkpoint.checkpoint
    trainer = split_trainer(run, [TokenCountMonitor()])
    trainer.fit(module, split_loader([image_batch(1)], run, rank))
    hooks = [m for m in module.modules() if m._forward_pre_hooks or m._forward_hooks]
    return [
        torch.utils.checkpoint.checkpoint is before,
        [type(m).__name__ for m in hooks],
        float(trainer.callback_metrics["train/loss"]),
    ]


def test_teardown_takes_the_hooks_off(pool: ProcessPool) -> None:
    reference = fit_single(denoiser(), [[image_batch(1)]], count_samples)
    for restored, hooked, loss in pool.run(fit_and_look, world_size=2):
        assert restored and not [name for name in hooked if "Block" in name or name == "Linear"]
        assert loss == pytest.approx(reference.losses[0], rel=1e-5)


def test_yaml_and_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    written = {"split": {"transformer.h.*": {"x": 1, 1: -2}}, "join": {"lm_head": {0: 1}}}
    (tmp_path / "a.yaml").write_text(
        "trainer:\n  accelerator: cpu\n  strategy:\n    class_path: lightning_ulysses.UlyssesDeepSpeedStrategy\n"
        "    init_args:\n      plan:\n        split: {transformer.h.*: {x: 1, 1: -2}}\n"
        "        join: {lm_head: {0: 1}}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["program"])
    alone: dict[str, Any] = {"run": False, "save_config_callback": None, "seed_everything_default": False}
    cli = LightningCLI(LitModule, args=["--config", "a.yaml"], **alone)
    strategy = cli.trainer.strategy
    assert isinstance(strategy, UlyssesDeepSpeedStrategy) and strategy.ulysses.plan == read_plan(written)
    help_of = "--trainer.strategy.help=lightning_ulysses.UlyssesDeepSpeedStrategy"
    with pytest.raises(SystemExit):
        LightningCLI(LitModule, args=[help_of], **alone)
    assert "plan" in capsys.readouterr().out


def example() -> Any:
    """The module of the example, which is no part of the package."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import plan as written
    finally:
        sys.path.pop(0)
    return written


def built_example() -> Any:
    torch.manual_seed(0)
    return example().Model()


def run_example(rank: int) -> tuple[Any, str]:
    written = example()
    result = fit_rank(rank, built_example, [written.sequences(2)], SplitRun(strategy={"plan": written.PLAN}))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        written.main()
    return result, printed.getvalue()


def test_the_example(pool: ProcessPool) -> None:
    written = example()
    reference = fit_single(built_example, [[written.sequences(2)]], lambda batch: float(batch[:, 1:].numel()))
    results = pool.run(run_example, world_size=2)
    for result, _ in results:
        # Adam divides a wrong scale away; the gradient's norm does not.
        assert result.losses[0] == pytest.approx(reference.losses[0], rel=1e-5)
        assert result.grad_norms[0] == pytest.approx(reference.grad_norms[0], rel=1e-5)
    found = re.search(r"loss (\S+) after 20 steps", results[0][1])
    assert found is not None and float(found[1]) < 3.0


def test_verify_follows_a_plan(pool: ProcessPool) -> None:
    batch = image_batch(1)
    report = verify_parity(Denoiser(), batch, strategy={"plan": "diffusers"}, pool=pool)
    assert report.exact, report
    mixed = verify_parity(LitModule(mixes=True), TEXT[0], strategy={"plan": "litgpt"}, pool=pool)
    assert not mixed.exact and mixed.finding is not None
    assert mixed.finding.module == "gpt.transformer.h.1.mlp", mixed


def test_verify_of_a_model_that_runs_whole(pool: ProcessPool) -> None:
    """It counts positions in its outermost forward, so that all of it runs on the whole sequence."""
    report = verify_parity(LitModule(loss="given"), TEXT[0], strategy={"split": "batch"}, pool=pool)
    assert report.exact and report.finding is None, report
