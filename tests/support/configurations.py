"""Random configurations of a run, each of which must be exact or refused by name.

From the command line, any number of them from any seed:

    PYTHONPATH=.:tests/support python tests/support/configurations.py --first 0 --count 200
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from models import VOCAB, count_targets, hand_written, llama
from torch import Tensor

from lightning_ulysses import PackingCollator, UlyssesError
from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool, RemoteError

BOUND = 1e-5


@dataclass(frozen=True)
class Configuration:
    """One run.

    Args:
        seed: Of the configuration, its tokens and its labels.
        model: ``"llama"``, ``"mistral"`` (with a window) or ``"hand"``.
        heads: H.
        kv_heads: H_kv.
        sp_size: P.
        dp_size: Data-parallel groups.
        stage: Of ZeRO.
        accumulate: Micro-batches of a step.
        lengths: S of each micro-batch of each group, in the order in which they are dealt.
        rows: B.
        labels: How labels are spread: ``"even"``, ``"uneven"``, or ``"first"``, where only the first tokens have any.
        packed: Whether each row is a pack of documents.
        split: Where the sequence is split.
        clip: Largest gradient norm.
    """

    seed: int
    model: str
    heads: int
    kv_heads: int
    sp_size: int
    dp_size: int
    stage: int
    accumulate: int
    lengths: tuple[int, ...]
    rows: int
    labels: str
    packed: bool
    split: str
    clip: float | None

    @property
    def world_size(self) -> int:
        """W."""
        return self.sp_size * self.dp_size

    def make(self) -> Any:
        """A picklable factory of the module."""
        if self.model == "hand":
            return hand_written(heads=self.heads, kv_heads=self.kv_heads)
        window = 5 if self.model == "mistral" else None
        return llama(heads=self.heads, kv_heads=self.kv_heads, window=window)

    def batches(self) -> list[dict[str, Tensor]]:
        """The micro-batches of all groups."""
        return [PackingCollator()(rows) if self.packed else rows[0] for rows in self._rows()]

    def whole_batches(self) -> list[dict[str, Tensor]]:
        """The same for one process, in which each document of a pack is a batch of its own."""
        return [self._batch(row) if self.packed else row for rows in self._rows() for row in rows]

    @staticmethod
    def _batch(row: dict[str, Tensor]) -> dict[str, Tensor]:
        # (tokens,) -> (1, tokens)
        return {name: tensor[None] for name, tensor in row.items()}

    def _rows(self) -> list[list[dict[str, Tensor]]]:
        return [self._draw(1000 * self.seed + index, length) for index, length in enumerate(self.lengths)]

    def _draw(self, seed: int, length: int) -> list[dict[str, Tensor]]:
        """A micro-batch, or the documents of one."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, VOCAB, (self.rows, length), generator=generator)
        labels = tokens.clone()
        if self.labels == "uneven":
            labels[torch.rand(labels.shape, generator=generator) < 0.6] = -100
        elif self.labels == "first":
            labels[:, max(2, length // 4) :] = -100
        # At least one target remains behind the shift.
        labels[:, 1] = tokens[:, 1]
        if self.packed:
            parts = slice(0, 2 + length // 3), slice(2 + length // 3, None)
            return [{"input_ids": tokens[0, part], "labels": labels[0, part]} for part in parts]
        if self.model == "hand":
            shifted = torch.full_like(labels, -100)
            shifted[:, :-1] = labels[:, 1:]
            return [{"input_ids": tokens, "shift_labels": shifted}]
        return [{"input_ids": tokens, "labels": labels}]


def draw(seed: int) -> Configuration:
    """The configuration of a seed."""
    rng = random.Random(seed)
    model = rng.choice(["llama", "llama", "mistral", "hand"])
    heads, kv_heads = rng.choice([(4, 4), (4, 2), (4, 1), (6, 3), (5, 5), (9, 3), (3, 1), (8, 2), (2, 2)])
    sp_size, dp_size = rng.choice([(2, 1), (2, 2), (3, 1), (4, 1), (1, 2), (2, 1)])
    accumulate = rng.choice([1, 1, 2, 3])
    # Packs tell a hand-written model nothing of its documents.
    packed = model != "hand" and rng.random() < 0.4
    lengths = tuple(rng.choice([7, 16, 33, 45, 64]) for _ in range(accumulate * dp_size))
    return Configuration(
        seed,
        model,
        heads,
        kv_heads,
        sp_size,
        dp_size,
        stage=rng.choice([1, 2, 3]),
        accumulate=accumulate,
        lengths=lengths,
        rows=1 if packed else rng.choice([1, 2, 3]),
        labels=rng.choice(["even", "uneven", "first"]),
        packed=packed,
        split=rng.choice(["auto", "auto", "batch", "blocks"]),
        clip=rng.choice([None, None, 0.05]),
    )


def outcome(pool: ProcessPool, configuration: Configuration) -> str:
    """``"exact"``, or ``"refused: ..."`` with the message.

    Raises:
        AssertionError: If the step is another one than that of one process.
        RemoteError: If the run fails by anything but a refusal.
    """
    batches = configuration.batches()
    strategy = {"stage": configuration.stage, "split": configuration.split}
    trainer = {"accumulate_grad_batches": configuration.accumulate, "gradient_clip_val": configuration.clip}
    run = SplitRun(configuration.world_size, configuration.sp_size, strategy, trainer)
    try:
        results = fit_split(pool, configuration.make(), batches, run)
    except RemoteError as failure:
        if isinstance(failure.cause, UlyssesError):
            return f"refused: {failure.cause}"
        raise
    wanted = fit_single(configuration.make(), [configuration.whole_batches()], count_targets, clip=configuration.clip)
    assert wanted.step().norm() > 1e-4
    for result in results:
        assert compare(result, wanted).largest <= BOUND, compare(result, wanted)
    return "exact"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=200, help="configurations")
    args = parser.parse_args()
    begin, failed, refused = time.monotonic(), [], 0
    with ProcessPool(4, timeout=300.0) as pool:
        for seed in range(args.first, args.first + args.count):
            try:
                found = outcome(pool, draw(seed))
            except Exception as failure:
                failed.append(seed)
                found = f"WRONG: {failure}\n{draw(seed)}"
            refused += found.startswith("refused")
            print(f"{seed}: {found}", flush=True)
    seconds = time.monotonic() - begin
    print(f"{args.count} configurations, {refused} refused, wrong or failed: {failed}, {seconds:.0f} s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
