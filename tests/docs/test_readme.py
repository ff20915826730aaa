"""Every snippet and command of the documents runs; see `test_references` for the names in them."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from models import HandWritten, LlamaModule, count_targets, hand_written, llama, pair_batch, token_batch
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_ulysses
from lightning_ulysses import UlyssesDeepSpeedStrategy
from lightning_ulysses.attention.route import AttentionTally
from lightning_ulysses.batch.whole import read_batch
from lightning_ulysses.cli.main import _parser as command_line
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.exchange.mesh import MeshSizes, SequenceMesh
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.geometry.split_plan import SHIPPED, read_plan
from lightning_ulysses.testing import (
    QUIET,
    SplitRun,
    StepResult,
    compare,
    fit_rank,
    fit_single,
    split_loader,
    split_trainer,
)
from lightning_ulysses.testing.processes import ProcessPool

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
LANGUAGES = ("python", "yaml", "sh", "text")
Names = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """A fenced block; its name is the document, the heading above it, and a number within that section."""

    name: str
    language: str
    source: str


def blocks_of(name: str, text: str) -> list[Block]:
    found, heading, fence, lines, number = [], "", None, [], 0
    for line in text.splitlines():
        mark = re.match(r"\s*(`{3,}|~{3,})\s*(.*)", line)
        if fence is None and mark:
            fence, language, lines = mark[1], mark[2].strip(), []
        elif fence is not None and line.strip() == fence:
            number += 1
            found.append(Block(f"{name} / {heading} / {number}", language, "\n".join(lines) + "\n"))
            fence = None
        elif fence is not None:
            lines.append(line)
        elif re.match(r"#+ ", line):
            heading, number = line.lstrip("# ").strip(), 0
    assert fence is None, f"{name}: the block that starts with {lines[:1]} has no end"
    return found


TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
BLOCKS = [block for name, text in TEXTS.items() for block in blocks_of(name, text)]


def of(language: str) -> list[Any]:
    return [pytest.param(block, id=block.name) for block in BLOCKS if block.language == language]


def test_blocks_are_found() -> None:
    text = "# A\n```python\nx = 1\n# no heading\n```\n\n## B\n~~~yaml\na: 1\n~~~\n"
    assert blocks_of("D", text) == [
        Block("D / A / 1", "python", "x = 1\n# no heading\n"),
        Block("D / B / 1", "yaml", "a: 1\n"),
    ]
    assert {block.language for block in BLOCKS} <= set(LANGUAGES), "a block in a language that nothing here checks"
    for language in LANGUAGES:
        assert of(language)


# What the snippets may take for granted.

ROWS = [{key: tensor[0] for key, tensor in token_batch(seed, 33, 1, "uneven").items()} for seed in range(4)]
WHOLE = [{key: tensor[None] for key, tensor in row.items()} for row in ROWS]


def given(folder: str) -> Names:
    return {"module": LlamaModule(lr=0.1), "data": DataLoader(ROWS, batch_size=1)}


def given_positions(folder: str) -> Names:
    return {"module": HandWritten(positions="own", lr=0.1), "data": DataLoader(ROWS, batch_size=1)}


def check_plan(names: Names) -> None:
    assert names["trainer"].global_step == 4
    whole = [[{**batch, "shift_labels": F.pad(batch["labels"][:, 1:], (0, 1), value=-100)}] for batch in WHOLE]
    order = list(names["trainer"].train_dataloader.sampler)
    trained(names, fit_single(hand_written(lr=0.1), [whole[index] for index in order], count_targets))
    assert {"litgpt", "litgpt_unjoined", "diffusers"} == set(SHIPPED)


def given_whole(folder: str) -> Names:
    return {"module": LlamaModule(lr=0.1), "batch": WHOLE[0]}


def given_heads(folder: str) -> Names:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 5, 8, generator=generator) for heads in (4, 2, 2))
    return {"q": q, "k": k, "v": v, "batch": {"cu_seqlens": torch.tensor([0, 2, 5])}}


class Letters:
    """A tokenizer with the vocabulary of the test model."""

    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1 + ord(letter) % 60 for letter in text]}

    def get_vocab(self) -> dict[str, int]:
        return {chr(code): 1 + code % 60 for code in range(128)}


def given_files(folder: str) -> Names:
    os.environ["XDG_CACHE_HOME"] = folder
    Path("documents").mkdir(exist_ok=True)
    rows = (json.dumps({"text": "word " * number}) + "\n" for number in range(1, 12))
    # Each rank may be the first to read it.
    own = Path(f"rank{os.environ['RANK']}.jsonl")
    own.write_text("".join(rows))
    own.replace(Path("documents", "a.jsonl"))
    return {"module": LlamaModule(lr=0.1), "tokenizer": Letters()}


def given_documents(folder: str) -> Names:
    documents = [{"input_ids": [1 + number] * (3 + number)} for number in range(9)]
    return {"module": LlamaModule(lr=0.1), "documents": documents, "source": lambda: iter(documents)}


def save_checkpoint(rank: int, folder: str) -> None:
    """Stops after the first of four steps."""
    saver = ModelCheckpoint(dirpath=f"{folder}/checkpoints", filename="last", every_n_train_steps=1)
    settings = {"max_steps": 1, "enable_checkpointing": True, "use_distributed_sampler": True}
    names = given(folder)
    split_trainer(SplitRun(trainer=settings), [saver]).fit(names["module"], names["data"])


# What has to be true behind them; each check runs on every rank.


def trained(names: Names, reference: StepResult) -> None:
    after = {name: parameter.detach().cpu() for name, parameter in names["module"].named_parameters()}
    found = StepResult(reference.losses, reference.grad_norms, reference.before, after)
    assert compare(found, reference).step <= 1e-5


def check_two_lines(names: Names) -> None:
    strategy = names["trainer"].strategy
    assert isinstance(strategy, UlyssesDeepSpeedStrategy) and strategy.mesh.sp_size == 2
    assert names["trainer"].global_step == 1
    trained(names, fit_single(llama(lr=0.1), [WHOLE], count_targets, clip=1.0))


def check_strategy(names: Names) -> None:
    strategy = names["trainer"].strategy
    assert strategy is names["strategy"] and strategy.ulysses.sp_size == 4
    assert strategy.config["zero_optimization"]["stage"] == 3
    assert strategy.config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def check_sequence_dims(names: Names) -> None:
    batch = {"features": torch.rand(2, 8, 3), "targets": torch.ones(2, 8).long(), "image": torch.rand(2, 8, 8)}
    rules = names["strategy"].ulysses.rules
    assert read_batch(batch, rules, 2).dims == {"features": 1, "targets": 1}


def check_documents(names: Names) -> None:
    whole = read_batch(names["batch"], UlyssesDeepSpeedStrategy().ulysses.rules, 2)
    assert whole.layout.documents == (((0, 3), (3, 5)),)
    assert whole.tensors["shift_labels"].tolist() == [[6, 7, -100, 9, -100]]


def tokens_of(loader: Any) -> int:
    return sum(int((batch["labels"] != -100).sum()) + len(batch["cu_seqlens"]) - 2 for batch in loader)


def check_files(names: Names) -> None:
    documents = names["data"].documents
    assert (len(documents["train"]), len(documents["validation"])) == (10, 1)
    assert documents["train"].lengths.sum() + documents["validation"].lengths.sum() == 5 * 66 + 11
    assert names["trainer"].global_step == 1 and len(list(Path("lightning_ulysses").iterdir())) == 1


def check_sampler(names: Names) -> None:
    assert names["trainer"].global_step == 1
    assert tokens_of(names["loader"]) == sum(range(3, 12))


def check_stream(names: Names) -> None:
    assert tokens_of(names["loader"]) == sum(range(3, 12))


def check_tiny_gpt(names: Names) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        return names["TinyGPT"]()

    batches = [pair_batch(seed, 33, 2, "uneven") for seed in range(2)]
    reference = fit_single(make, [batches], count_targets)
    run = SplitRun(trainer={"accumulate_grad_batches": 2})
    assert compare(fit_rank(int(os.environ["RANK"]), make, batches, run), reference).largest <= 1e-5


def check_explicit_attention(names: Names) -> None:
    parts = [names[name].split([2, 3], dim=2) for name in ("q", "k", "v")]
    wanted = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in zip(*parts, strict=True)
    ]
    torch.testing.assert_close(names["out"], torch.cat(wanted, dim=2))


def check_unsharded(names: Names) -> None:
    class Previewing(LlamaModule):
        validation_step = names["validation_step"]
        preview: Tensor

    module, run = Previewing(), SplitRun()
    split_trainer(run).validate(module, split_loader(WHOLE[:1], run, 0), verbose=False)
    with torch.no_grad():
        wanted = LlamaModule().model(input_ids=WHOLE[0]["input_ids"][:, :8]).logits
    torch.testing.assert_close(module.preview, wanted)


def check_loss(names: Names) -> None:
    by_mask, none = names["by_mask"].ulysses, names["no_token_mean"].ulysses
    assert (by_mask.targets, by_mask.rules.ignore_index, by_mask.loss_weighting) == ("loss_mask", -1, "tokens")
    assert none.loss_weighting == "none"


def check_monitor(names: Names) -> None:
    found = names["trainer"].callback_metrics
    assert {"train/loss", "tokens/global", "throughput/tokens_per_sec"} <= set(found)
    assert found["tokens/global"] == 33
    saver = names["saver"]
    saved = Path(saver.best_model_path)
    assert saved.parent.name == "checkpoints" and (saved / "checkpoint").is_dir()
    assert 0 < saver.best_model_score < 10


def check_resumed(names: Names) -> None:
    assert names["trainer"].global_step == 4
    order = list(names["trainer"].train_dataloader.sampler)
    trained(names, fit_single(llama(lr=0.1), [[WHOLE[index]] for index in order], count_targets))


def check_export(names: Names) -> None:
    from safetensors.torch import load_file

    weights = names["module"].model.state_dict()
    exported = load_file("model.safetensors")
    assert set(exported) == set(weights)
    assert all(torch.equal(exported[name], weights[name]) for name in exported)
    # One step from where it began, which is where a fresh module still is.
    assert not torch.equal(weights["lm_head.weight"], LlamaModule().model.state_dict()["lm_head.weight"])


def given_ops(folder: str) -> Names:
    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    ops: Any = ModuleType("my_ops")
    ops.attention = attention
    sys.modules["my_ops"] = ops
    return {}


def check_interceptor(names: Names) -> None:
    ops = sys.modules.pop("my_ops")
    original, rank = ops.attention, int(os.environ["RANK"])
    dist.init_process_group("gloo")
    context = SequenceContext(SequenceMesh.create(MeshSizes(2, 1), "cpu"))
    layout = SequenceLayout(5, 2)
    heads = given_heads("")
    q, k, v = heads["q"], heads["k"], heads["v"]
    wanted = original(q, k, v, True)
    handle = names["install"](context)
    assert ops.attention is not original
    assert torch.equal(ops.attention(q, k, v, True), wanted)
    span = layout.spans[rank]
    with context.step(LocalBatch(layout)):
        mine = ops.attention(q[:, :, span], k[:, :, span], v[:, :, span], True)
    torch.testing.assert_close(mine, wanted[:, :, span])
    assert context.notes.of(AttentionTally).calls == 1
    handle.remove()
    assert ops.attention is original


@dataclass(frozen=True)
class Use:
    """How a snippet is run.

    Args:
        check: What has to be true behind it.
        names: What it takes for granted.
        world: Processes; 0 for a test that is run here, on the pool.
        checkpoint: Whether it needs one.
    """

    check: Callable[[Names], None]
    names: Callable[[str], Names] = given
    world: int = 2
    checkpoint: bool = False


USES: dict[str, Use] = {
    "README.md / Use it / 2": Use(check_two_lines),
    "README.md / Use it / 3": Use(check_strategy, world=1),
    "README.md / Batches / 1": Use(check_sequence_dims, world=1),
    "README.md / Batches / 2": Use(check_documents, world=1),
    "README.md / Data / 1": Use(check_files, given_files),
    "README.md / Data / 2": Use(check_sampler, given_documents),
    "README.md / Data / 3": Use(check_stream, given_documents, world=1),
    "README.md / Models split inside / 2": Use(check_plan, given_positions),
    "README.md / Models / 1": Use(check_tiny_gpt),
    "README.md / Models / 2": Use(check_explicit_attention, given_heads, world=1),
    "README.md / Models / 3": Use(check_unsharded),
    "README.md / Loss and logging / 1": Use(check_loss, world=1),
    "README.md / Loss and logging / 2": Use(check_monitor),
    "README.md / Checkpoints / 1": Use(check_resumed, checkpoint=True),
    "README.md / Checkpoints / 2": Use(check_export, world=1, checkpoint=True),
    "README.md / Check your own module / 2": Use(lambda names: None, given_whole, world=0),
    "CONTRIBUTING.md / A parity test, with its negative control / 1": Use(lambda names: None, world=0),
    "CONTRIBUTING.md / An attention interceptor / 1": Use(check_interceptor, given_ops),
}


def test_every_python_snippet_has_a_use() -> None:
    assert {block.name for block in BLOCKS if block.language == "python"} == set(USES)


def run_snippet(rank: int, name: str, source: str, folder: str) -> None:
    use, before = USES[name], os.getcwd()

    def small_trainer(**kwargs: Any) -> Any:
        own = {**QUIET, "enable_checkpointing": True, "default_root_dir": folder, "max_epochs": 1}
        return L.pytorch.Trainer(**{**own, **kwargs, "accelerator": "cpu", "devices": use.world})

    os.chdir(folder)
    try:
        with mock.patch.object(L, "Trainer", small_trainer):
            names = use.names(folder)
            exec(compile(source, name, "exec"), names)
        use.check(names)
    finally:
        os.chdir(before)


@pytest.mark.parametrize("block", of("python"))
def test_python(pool: ProcessPool, tmp_path: Path, block: Block) -> None:
    assert block.name in USES, f"{block.name} is not covered: say in USES how it is run"
    use = USES[block.name]
    if use.checkpoint:
        pool.run(save_checkpoint, str(tmp_path), world_size=2)
    if use.world:
        pool.run(run_snippet, block.name, block.source, str(tmp_path), world_size=use.world)
        return
    names: Names = {"__name__": "snippet", **use.names(str(tmp_path))}
    exec(compile(block.source, block.name, "exec"), names)
    tests = [names[name] for name in names if name.startswith("test_") and isinstance(names[name], FunctionType)]
    assert tests or "\nassert " in block.source
    for test in tests:
        test(pool)


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
    assert strategy.ulysses.sp_size == written["sp_size"]
    assert strategy.ulysses.plan == read_plan(written.get("plan"))
    assert strategy.config["zero_optimization"]["stage"] == written.get("stage", 2)
    assert ("offload_optimizer" in strategy.config["zero_optimization"]) == written.get("offload_optimizer", False)
    for callback in settings.get("callbacks", []):
        kind = getattr(lightning_ulysses, callback["class_path"].rpartition(".")[2])
        assert any(isinstance(found, kind) for found in cli.trainer.callbacks)


@pytest.mark.parametrize("block", of("sh"))
def test_commands(block: Block) -> None:
    """A command is a target of the Makefile, an install of this folder, or a run of a file in it."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    project = (ROOT / "pyproject.toml").read_text()
    for line in block.source.splitlines():
        program, *arguments = shlex.split(line)
        if program == "make":
            assert arguments and set(arguments) <= targets, line
        elif program == "pip":
            extra = re.fullmatch(r"\.(?:\[(\w+)\])?", arguments[1])
            assert arguments[0] == "install" and len(arguments) == 2 and extra, line
            assert extra[1] is None or re.search(rf"^{extra[1]} = \[", project, re.MULTILINE), line
        elif program == "lightning-ulysses":
            assert command_line().parse_args(arguments)
        else:
            assert program in (".venv/bin/pytest", ".venv/bin/python"), line
            assert (ROOT / arguments[0]).is_file(), line


@pytest.mark.parametrize("block", of("text"))
def test_shown_output_has_the_lines_of_the_demo(block: Block) -> None:
    source = (ROOT / "examples" / "demo_summary.py").read_text()
    for line in block.source.splitlines():
        assert re.match(r"\S.{17} \S", line) and f'"{line[:19].strip()}"' in source, line
