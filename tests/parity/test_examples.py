"""The example programs: one step of each against one process, and what a run prints."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import default_collate

from lightning_ulysses.testing import SplitRun, StepResult, compare, fit_rank, fit_single
from lightning_ulysses.testing.processes import ProcessPool

ROOT = Path(__file__).parents[2]
SEED = 11
# The class of the module, the function that makes its data, and what a run must print.
EXAMPLES = {
    "dpo": ("DPO", "pairs", r"loss 0\.[0-4]\d*, accuracy (1\.00|0\.9\d) after 16 steps"),
    "masked_diffusion": ("MaskedDiffusion", "sequences", r"loss [01]\.\d+ after 60 steps"),
    "proteins": ("ProteinModel", "proteins", r"loss [01]\.\d+ after 60 steps"),
    "series_mae": ("MaskedAutoencoder", "series", r"loss \d+\.\d+ after 80 steps"),
}


def example(name: str) -> Any:
    """A module of the examples, which are no part of the package."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def built(name: str) -> Any:
    torch.manual_seed(0)
    return getattr(example(name), EXAMPLES[name][0])()


def batches(name: str) -> list[Any]:
    rows = getattr(example(name), EXAMPLES[name][1])(8)
    return [default_collate(rows[:4]), default_collate(rows[4:])]


def run_example(rank: int, name: str) -> tuple[StepResult, str]:
    run = SplitRun(trainer={"accumulate_grad_batches": 2})
    L.seed_everything(SEED, verbose=False)
    result = fit_rank(rank, partial(built, name), batches(name), run)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        example(name).main()
    return result, printed.getvalue()


def alike(batch: Any) -> float:
    """Micro-batches count alike where the loss is no mean over targets."""
    return float((batch["labels"] != -100).sum()) if "labels" in batch else 1.0


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(pool: ProcessPool, name: str) -> None:
    results = pool.run(run_example, name, world_size=2)
    reference = fit_single(partial(built, name), [batches(name)], alike, seed=SEED)
    for result, _ in results:
        # AdamW divides a wrong scale of the gradient away; the gradient's norm does not.
        assert result.losses[0] == pytest.approx(reference.losses[0], rel=1e-5)
        assert result.grad_norms[0] == pytest.approx(reference.grad_norms[0], rel=1e-5)
        assert compare(result, reference).step <= 1e-2
    assert re.search(EXAMPLES[name][2], results[0][1]), results[0][1]
