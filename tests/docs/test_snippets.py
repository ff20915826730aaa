"""Every Python snippet of the documents runs; see `test_commands` for the others."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any
from unittest import mock

import lightning as L
import pytest
import snippet_checks as checks
import snippet_names as given
from documents import BLOCKS, Block, of
from snippet_names import PROGRAM, Names

from lightning_ulysses.testing import QUIET
from lightning_ulysses.testing.processes import ProcessPool


@dataclass(frozen=True)
class Use:
    """How a snippet is run.

    Args:
        check: What has to be true after it.
        names: What it takes for granted.
        world: Processes; 0 for a test that is run here, on the pool.
        prepare: Makes files that it needs, once for all ranks.
    """

    check: Callable[[Names], None]
    names: Callable[[str], Names] = given.given
    world: int = 2
    prepare: Callable[[ProcessPool, str], None] | None = None


USES: dict[str, Use] = {
    "README.md / Two lines change / 1": Use(checks.check_two_lines),
    "README.md / Exact, and how to check your own module / 1": Use(checks.nothing, given.given_whole, world=0),
    "README.md / Recipes / 1": Use(checks.check_chats, given.given_chats, prepare=given.save_chats_and_model),
    "README.md / Recipes / 2": Use(checks.check_place, given.given_place, world=1),
    "README.md / Recipes / 3": Use(checks.check_pack, given.given_package, world=1),
    "docs/index.md / lightning-ulysses / 1": Use(checks.check_default),
    "docs/index.md / Settings / 1": Use(checks.check_strategy, world=1),
    "docs/batches.md / Batches / 1": Use(checks.check_sequence_dims, world=1),
    "docs/batches.md / Packed documents / 1": Use(checks.check_documents, world=1),
    "docs/data.md / Data / 1": Use(checks.check_files, given.given_files),
    "docs/data.md / Datasets of your own / 1": Use(checks.check_sampler, given.given_documents),
    "docs/data.md / Streams / 1": Use(checks.check_stream, given.given_documents, world=1),
    "docs/splitting.md / Plans without a join / 1": Use(checks.check_plan, given.given_positions),
    "docs/your-model.md / Hand-written models / 1": Use(checks.check_tiny_gpt),
    "docs/your-model.md / Hand-written models / 2": Use(checks.check_explicit_attention, given.given_heads, world=1),
    "docs/your-model.md / The whole sequence inside a step / 1": Use(checks.check_unsharded),
    "docs/loss-and-logging.md / Which losses are exact / 1": Use(checks.check_loss, world=1),
    "docs/loss-and-logging.md / `TokenCountMonitor` / 1": Use(checks.check_monitor),
    "docs/memory.md / In a loss written by hand / 1": Use(checks.check_tiled_loss, given.given_hidden, world=1),
    "docs/checkpoints.md / Checkpoints / 1": Use(checks.check_resumed, prepare=given.save_last),
    "docs/checkpoints.md / Weights for other programs / 1": Use(checks.check_export, world=1, prepare=given.save_last),
    "docs/verify.md / Verify / 2": Use(checks.nothing, given.given_whole, world=0),
    "docs/clusters.md / Ray / 1": Use(checks.check_ray, given.given_ray),
    "docs/reliability.md / Checkpoints / 1": Use(
        checks.check_resumed_newest, given.given_trainer, prepare=given.save_last
    ),
    "docs/fabric.md / Fabric / 1": Use(checks.check_fabric, given.given_loop),
    "docs/errors.md / Errors / 1": Use(checks.check_default, given.given_trainer),
    "CONTRIBUTING.md / A parity test, with its negative control / 1": Use(checks.nothing, world=0),
    "CONTRIBUTING.md / An attention interceptor / 1": Use(checks.check_interceptor, given.given_ops),
}
# Of pages that say nothing else: it runs in one process, with the public names at hand.
OTHERWISE = Use(checks.nothing, given.given_package, world=1)


def use_of(name: str) -> Use:
    return USES.get(name, OTHERWISE) if name.startswith("docs/") else USES[name]


def test_every_python_snippet_has_a_use() -> None:
    found = [block.name for block in BLOCKS if block.language == "python" and block.name != PROGRAM]
    assert len(found) == len(set(found)), "two headings of a page are alike"
    assert set(USES) <= set(found), "a snippet has another heading now"
    assert {name for name in found if not name.startswith("docs/")} <= set(USES), "say in USES how it is run"


def run_snippet(rank: int, name: str, source: str, folder: str) -> None:
    use, before = use_of(name), os.getcwd()

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


@pytest.mark.parametrize("block", [each for each in of("python") if each.id != PROGRAM])
def test_python(pool: ProcessPool, tmp_path: Path, block: Block) -> None:
    use = use_of(block.name)
    if use.prepare is not None:
        use.prepare(pool, str(tmp_path))
    if use.world:
        pool.run(run_snippet, block.name, block.source, str(tmp_path), world_size=use.world)
        return
    names: Names = {"__name__": "snippet", **use.names(str(tmp_path))}
    exec(compile(block.source, block.name, "exec"), names)
    tests = [names[name] for name in names if name.startswith("test_") and isinstance(names[name], FunctionType)]
    assert tests or "\nassert " in block.source
    for test in tests:
        test(pool)
