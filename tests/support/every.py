"""One step of every architecture of transformers that can be built tiny, on two processes against one.

python tests/support/every.py --file every.jsonl --seconds 240    # goes on where the file ends
python tests/support/every.py --page                              # writes docs/architectures.md from the stored lines
"""

from __future__ import annotations

import argparse
import json
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tiny import KINDS, Tiny, Unbuilt, architectures, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ulysses.geometry.distance import largest
from lightning_ulysses.testing import SplitRun, StepResult, compare, fit_rank, fit_single
from lightning_ulysses.testing.processes import ProcessPool, RemoteError

ROOT = Path(__file__).parents[2]
LINES, PAGE = ROOT / "tests" / "support" / "every.jsonl", ROOT / "docs" / "architectures.md"
BOUND, PATIENCE = 1e-5, 8.0


def fit_and_listen(rank: int, cls: str, config: Any, batches: list[Any]) -> tuple[StepResult, list[str]]:
    said: list[str] = []
    warnings.simplefilter("ignore")
    listening = mock.patch("lightning_ulysses.strategy.rank_zero_info", said.append)
    # A rank that fails alone, or waits in another exchange, is waited for.
    patience = {"_PATIENCE": PATIENCE, "_LONG_PATIENCE": 2 * PATIENCE}
    with listening, mock.patch.multiple("lightning_ulysses.checks.trial.runs", **patience):
        result = fit_rank(rank, partial(Tiny, cls, config), batches, SplitRun())
    return result, [line for line in said if "steps of 'train'" in line]


def tried(pool: ProcessPool, name: str, kind: str, cls: str) -> dict[str, Any]:
    """What a step of one architecture does; see `line_of`."""
    row: dict[str, Any] = {"type": name, "class": cls}
    try:
        config, batch, kind = tiny(name, kind, cls)
    except Unbuilt as error:
        return {**row, "result": "unbuilt", "why": str(error)}
    reference = fit_single(partial(Tiny, cls, config), [[batch]], KINDS[kind].count)
    if not reference.step().norm() > 1e-4:
        return {**row, "result": "unbuilt", "why": "the step of one process moves nothing"}
    again = fit_single(partial(Tiny, cls, config), [[batch]], KINDS[kind].count)
    if compare(again, reference).largest > BOUND:
        return {**row, "result": "unbuilt", "why": "two steps of one process differ"}
    try:
        found = pool.run(fit_and_listen, cls, config, [batch], world_size=2)
    except RemoteError as error:
        why = first_line(error)
        is_without = "calls no attention" in why and not attends(partial(Tiny, cls, config), batch)
        return {**row, "result": "no sequence" if is_without else "refused", "why": why}
    error = largest(compare(result, reference).largest for result, _ in found)
    said = " ".join(line for _, lines in found for line in lines)
    return {**row, "result": "exact" if error <= BOUND else "wrong", "error": error, **how(said)}


class _Softmaxes(TorchDispatchMode):
    """Counts calls of softmax, by themselves or in fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += bool(re.search(r"_softmax|attention", str(func))) and "log_softmax" not in str(func)
        return func(*args, **(kwargs or {}))


def attends(make: Callable[[], Tiny], batch: dict[str, Any]) -> bool:
    """Whether tokens of a model meet in attention of any kind."""
    with _Softmaxes() as seen:
        make().training_step(batch, 0)
    return seen.count > 0


def first_line(error: RemoteError) -> str:
    text = str(error.cause) if error.cause is not None else str(error).strip().splitlines()[-1]
    return text.splitlines()[0][:300] if text else type(error.cause).__name__


def how(said: str) -> dict[str, str]:
    """Where a step was split, and what runs joined or with a halo, from the lines that say so."""
    split = re.search(r"Ulysses splits (\S+) in steps", said)
    joined = re.search(r"Tokens meet outside of attention in (.*?): every rank", said)
    halo = re.search(r"(?:divided\.|'train'\.|forbids it\.) ?([^:]*?) get the few tokens", said)
    parts = {"split": split[1] if split else "batch", "joined": joined and joined[1], "halo": halo and halo[1]}
    return {key: value for key, value in parts.items() if value}


def run(file: Path, seconds: float, names: list[str], limit: float) -> None:
    """Tries what the file has no line of, until the time is over."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    known = architectures()
    done = {json.loads(line)["type"] for line in file.read_text().splitlines()} if file.exists() else set()
    end = time.monotonic() + seconds
    pool = ProcessPool(2, timeout=limit)
    try:
        for name in names or known:
            if name in done or time.monotonic() > end:
                continue
            begin = time.monotonic()
            try:
                row = tried(pool, name, *known[name])
            except TimeoutError:
                row = {"type": name, "class": known[name][1], "result": "timeout"}
            except Exception as error:
                row = {"type": name, "class": known[name][1], "result": "failed"}
                row["why"] = repr(error)[:300]
            if row["result"] == "timeout" or "process died" in row.get("why", ""):
                pool.close()
                pool = ProcessPool(2, timeout=limit)
            with file.open("a") as out:
                out.write(json.dumps(row) + "\n")
            print(f"{time.monotonic() - begin:.1f} s", row, flush=True)
    finally:
        pool.close()


def page(file: Path) -> str:
    """The text of docs/architectures.md."""
    rows = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda row: row["type"])
    counts = Counter(row["result"] for row in rows)
    head = (
        "# Architectures\n\n"
        f"{len(rows)} of {len(architectures())} model types of transformers that have a class for text or for classes\n"
        "of images, built tiny by shrinking their default configuration: one optimizer step on two processes with\n"
        "default settings against one, in float32. The error is the largest relative difference of the step, the loss\n"
        "and the gradient norm. Networks without attention have no sequence to split, and are refused as such.\n"
        "`python tests/support/every.py` runs them, and writes this page with `--page`.\n\n"
        f"{', '.join(f'{count} {result}' for result, count in counts.most_common())}.\n\n"
        "| Type | Class | Result | Error | Split | Not divided | Halo | Why |\n| --- " + "| --- " * 7 + "|\n"
    )
    return head + "".join(map(line_of, rows))


def line_of(row: dict[str, Any]) -> str:
    """A row of the table."""
    error = f"{row['error']:.0e}" if "error" in row else ""
    where = "batch" if row.get("split") == "batch" else f"`{row['split']}`" if "split" in row else ""
    why = row.get("why", "").replace("|", "/").replace("\n", " ")[:120]
    cells = [row["type"], f"`{row['class']}`", row["result"], error, where, row.get("joined", ""), row.get("halo", "")]
    return "| " + " | ".join([*cells, why]) + " |\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, default=LINES)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--limit", type=float, default=60)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    if args.page:
        PAGE.write_text(page(args.file))
    else:
        run(args.file, args.seconds, args.names, args.limit)
