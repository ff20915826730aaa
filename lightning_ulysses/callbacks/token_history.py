"""The steps of a run so far: buffered on the device, copied in blocks, and stored in checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_ulysses.callbacks.token_ledger import (
    DOCUMENTS,
    FIELDS,
    LOSS,
    PADDING,
    PAIRS,
    PEAK,
    TARGETS,
    TOKENS,
    WORK,
    StepLedger,
)

GIB = 2.0**30
# Steps whose ranks are kept apart. Of earlier ones only what all ranks have together is kept.
_APART = 1000
Table = dict[str, NDArray[np.float64]]


@dataclass
class TokenHistory:
    """One record per optimizer step, kept by one rank.

    The last 1000 steps or more take 8 numbers of 8 bytes for each rank, and each earlier step 10 numbers for all ranks.

    Attributes:
        steps: Number of each step, from 1.
        seconds: Duration of each step; NaN for the first one of a fit.
        counts: (W, fields) of each of the last steps; see `token_ledger.FIELDS`.
        sums: (earlier steps, fields + 2) what `_sum_up` makes of the counts of each earlier step.
    """

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
    sums: Tensor = field(default_factory=lambda: torch.zeros(0, len(FIELDS) + 2, dtype=torch.float64))
    _on_device: int = 0

    def add(self, step: int, seconds: float, counts: Tensor) -> None:
        """Stores a step; ``counts`` stay on their device until `flush`."""
        self.steps.append(step)
        self.seconds.append(seconds)
        self.counts.append(counts)
        self._on_device += 1

    @property
    def waiting(self) -> int:
        """Number of steps still on the device."""
        return self._on_device

    def flush(self) -> None:
        """Copies everything to the host, in one transfer, and sums up steps that are long past."""
        if self._on_device:
            self.counts[-self._on_device :] = torch.stack(self.counts[-self._on_device :]).cpu().unbind()
            self._on_device = 0
        # Not one by one: each time all earlier sums are copied.
        if len(self.counts) >= _APART + _APART // 4:
            past, self.counts = self.counts[:-_APART], self.counts[-_APART:]
            self.sums = torch.cat([self.sums, torch.stack([_sum_up(counts) for counts in past])])

    def rewind(self, step: int) -> None:
        """Drops the steps after ``step``, which will be trained again."""
        self.flush()
        kept = sum(known <= step for known in self.steps)
        self.steps, self.seconds = self.steps[:kept], self.seconds[:kept]
        self.counts, self.sums = self.counts[: max(kept - len(self.sums), 0)], self.sums[:kept]

    def state_dict(self) -> dict[str, Any]:
        """Everything as tensors. Steps with the same number of ranks share a tensor of counts."""
        self.flush()
        sizes = [len(counts) for counts in self.counts]
        edges = [0, *(i for i in range(1, len(sizes)) if sizes[i] != sizes[i - 1]), len(sizes)]
        blocks = [torch.stack(self.counts[a:b]) for a, b in pairwise(edges) if a < b]
        return {
            "steps": torch.tensor(self.steps, dtype=torch.int64),
            "seconds": torch.tensor(self.seconds, dtype=torch.float64),
            "counts": blocks,
            "sums": self.sums,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> TokenHistory:
        """The history that a `state_dict` describes."""
        return cls(
            state["steps"].tolist(),
            state["seconds"].tolist(),
            [counts.cpu() for block in state["counts"] for counts in block.unbind()],
            # Checkpoints of earlier versions have the ranks of all steps.
            state["sums"].cpu() if "sums" in state else cls().sums,
        )

    def table(self, ledger: StepLedger, peak_flops: float | None) -> Table:
        """One row per step and rank, by column; see `token_report.COLUMNS`.

        Steps that are summed up have one row, whose rank is NaN.

        Args:
            ledger: Has the weights of the ranks and the operations of the model.
            peak_flops: Operations per second of one device. Without it, ``mfu`` is NaN.
        """
        self.flush()
        columns: dict[str, list[NDArray[np.float64]]] = {}
        for step, seconds, held in zip(self.steps, self.seconds, [*self.sums, *self.counts], strict=True):
            make, size = (_rows, len(held)) if held.dim() == 2 else (_row, 1)
            for name, values in make(step, seconds, held.numpy(), ledger, peak_flops).items():
                columns.setdefault(name, []).append(np.broadcast_to(values, size))
        return {name: np.concatenate(parts) for name, parts in columns.items()}


def _sum_up(counts: Tensor) -> Tensor:
    """(W, fields) of a step -> (fields + 2,): sums over ranks, but the largest peak, then the largest work, and W."""
    most, sums = counts.amax(dim=0), counts.sum(dim=0)
    sums[PEAK] = most[PEAK]
    return torch.cat([sums, most[WORK : WORK + 1], sums.new_full((1,), len(counts))])


def _row(
    step: int, seconds: float, sums: NDArray[np.float64], ledger: StepLedger, peak_flops: float | None
) -> dict[str, Any]:
    """The row of a step that is summed up: what all ranks have together."""
    *_, most_work, size = sums
    row = _rows(step, seconds, sums[None, : len(FIELDS)], ledger, peak_flops)
    return {
        **row,
        "rank": float("nan"),
        "weight": 1.0,
        "imbalance": most_work * size / sums[WORK],
        "mfu": row["mfu"] / size,
    }


def _rows(
    step: int, seconds: float, counts: NDArray[np.float64], ledger: StepLedger, peak_flops: float | None
) -> dict[str, Any]:
    """The rows of one step. A value that is the same on all ranks is a single number."""
    size, sums = len(counts), counts.sum(axis=0)
    tokens, targets, real = sums[TOKENS], sums[TARGETS], sums[TOKENS] - sums[PADDING]
    possible = seconds * size * peak_flops if peak_flops else float("nan")
    return {
        "step": float(step),
        "rank": np.arange(size, dtype=np.float64),
        "loss": sums[LOSS],
        "targets": counts[:, TARGETS],
        "weight": counts[:, TARGETS] / max(targets, 1) if ledger.by_targets else 1 / size,
        "tokens": counts[:, TOKENS],
        "padding": counts[:, PADDING],
        "documents": counts[:, DOCUMENTS],
        "padding_fraction": sums[PADDING] / tokens,
        "imbalance": counts[:, WORK].max() / counts[:, WORK].mean(),
        "seconds": seconds,
        "tokens_per_sec": real / seconds,
        "mfu": ledger.operations.of(real, sums[PAIRS]) / possible,
        "peak_gib": counts[:, PEAK] / GIB,
    }
