"""Packing a million documents: time, fill and balance of ``SequenceShardSampler`` beside naive order and beside TRL.

Two sets of lengths: log-normal, and the sizes in bytes of the standard library's ``.py`` files, drawn with replacement.
A pack holds 16 times the mean. Longer documents are truncated, as TRL's ``"bfd"`` does. Times are of one core, the best
of three; processor time hardly feels what else the machine is doing.

- naive: documents in random order, each into the current pack or else into a new one; packs dealt in turn.
- ours: from lengths to the first pack of epoch 0 on 8 data-parallel ranks.
- TRL: ``pack_dataset(strategy="bfd")``, as called by default, in batches of 1000 documents, where it is installed. Its
  documents are lists of nulls, which take no memory, so that only packing is timed. ``--whole`` adds all documents in
  one batch. One run each.

    python benchmarks/packing.py                 # five minutes; ten seconds without TRL
    python benchmarks/packing.py --documents 100000 --whole
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sysconfig
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from lightning_ulysses.data import CostModel, SequenceShardSampler
from lightning_ulysses.data.balance import imbalance, pack_costs
from lightning_ulysses.data.packing import Ints, Packs, random_order

RANKS, MEANS_PER_PACK = 8, 16
T = TypeVar("T")


def timed(call: Callable[[], T], repeats: int = 3) -> tuple[T, float, float]:
    """The result, and the least processor and wall seconds."""
    processor, wall = [], []
    for _ in range(repeats):
        begun = time.process_time(), time.perf_counter()
        result = call()
        processor.append(time.process_time() - begun[0])
        wall.append(time.perf_counter() - begun[1])
    return result, min(processor), min(wall)


def log_normal(count: int) -> Ints:
    return np.random.default_rng(0).lognormal(6, 1, count).astype(np.int64) + 1


def standard_library(count: int) -> Ints:
    files = Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")
    sizes = sorted(file.stat().st_size for file in files if "site-packages" not in file.parts)
    return np.random.default_rng(0).choice([size for size in sizes if size], count)


def naive(lengths: Ints, max_tokens: int) -> Packs:
    """Documents in random order, each into the current pack if it fits."""
    order = random_order(len(lengths), 0)
    ends = np.cumsum(lengths[order])
    offsets = [0]
    while offsets[-1] < len(order):
        before = ends[offsets[-1] - 1] if offsets[-1] else 0
        offsets.append(int(np.searchsorted(ends, before + max_tokens, side="right")))
    return Packs(order, np.array(offsets))


def dealt_in_turn(packs: Packs, lengths: Ints) -> float:
    costs = pack_costs(packs, lengths, CostModel())
    return imbalance(costs[: len(costs) // RANKS * RANKS].reshape(-1, RANKS))


def trl_packs(lengths: Ints, max_tokens: int, **settings: Any) -> Packs:
    """What TRL makes of documents of these lengths."""
    import datasets
    import pyarrow as pa
    from trl import pack_dataset

    datasets.disable_progress_bars()
    ends = np.concatenate([[0], np.cumsum(lengths)])
    table = pa.table({"input_ids": pa.LargeListArray.from_arrays(pa.array(ends), pa.nulls(int(ends[-1])))})
    packed = pack_dataset(
        datasets.Dataset(table), max_tokens, strategy="bfd", map_kwargs={"keep_in_memory": True, **settings}
    )
    column = packed.data.column("seq_lengths").combine_chunks()
    offsets = column.offsets.to_numpy().astype(np.int64)
    # The documents' lengths stand for the documents.
    return Packs(column.values.to_numpy().astype(np.int64), offsets)


def row(name: str, processor: float, wall: float, fill: float, waits: float) -> None:
    print(f"| {name} | {processor:.2f} | {wall:.2f} | {100 * fill:.2f} | {waits:.4f} |", flush=True)


def compare(name: str, lengths: Ints, whole: bool) -> None:
    max_tokens = int(np.ceil(MEANS_PER_PACK * lengths.mean()))
    kept = np.minimum(lengths, max_tokens)

    def fill(packs: int) -> float:
        return float(kept.sum() / (packs * max_tokens))

    print(f"\n{name}: {len(lengths):,} documents, {kept.sum():,} tokens, max_tokens={max_tokens:,}")
    print("| | processor s | wall s | fill % | imbalance, max/mean of 8 ranks |\n|---|---|---|---|---|")
    packs, processor, wall = timed(lambda: naive(kept, max_tokens))
    row("naive order", processor, wall, fill(len(packs)), dealt_in_turn(packs, kept))

    def ours() -> SequenceShardSampler:
        sampler = SequenceShardSampler(
            range(len(lengths)), lengths, max_tokens, overlong="truncate", num_replicas=RANKS, rank=0
        )
        next(iter(sampler))
        return sampler

    sampler, processor, wall = timed(ours)
    report = sampler.report()
    assert report.tokens == kept.sum()
    row("ours", processor, wall, report.fill, report.imbalance)
    if importlib.util.find_spec("trl") is None:
        print("TRL is not installed.")
        return
    for words, settings in (("TRL", {}), *([("TRL, one batch", {"batch_size": None})] if whole else [])):
        found = timed(lambda settings=settings: trl_packs(lengths, max_tokens, **settings), 1)  # type: ignore[misc]
        packs = found[0]
        assert packs.members.sum() == kept.sum()
        lengths_of_members = Packs(np.arange(len(packs.members)), packs.offsets)
        row(words, *found[1:], fill(len(packs)), dealt_in_turn(lengths_of_members, packs.members))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--whole", action="store_true", help="TRL also with all documents in one batch")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*longer than max_tokens")
    for name, make in (("log-normal", log_normal), ("standard library", standard_library)):
        compare(name, make(arguments.documents), arguments.whole)


if __name__ == "__main__":
    main()
