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
Table = dict[str, NDArray[np.float64]]


@dataclass
class TokenHistory:
    """One record per optimizer step, kept by one rank: 8 numbers of 8 bytes for each step and rank.

    Attributes:
        steps: Number of each step, from 1.
        seconds: Duration of each step; NaN for the first one of a fit.
        counts: (W, fields) of each step; see `token_ledger.FIELDS`.
    """

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
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
        """Copies everything to the host, in one transfer."""
        if self._on_device:
            self.counts[-self._on_device :] = torch.stack(self.counts[-self._on_device :]).cpu().unbind()
            self._on_device = 0

    def rewind(self, step: int) -> None:
        """Drops the steps after ``step``, which will be trained again."""
        self.flush()
        kept = sum(known <= step for known in self.steps)
        self.steps, self.seconds, self.counts = self.steps[:kept], self.seconds[:kept], self.counts[:kept]

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
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> TokenHistory:
        """The history that a `state_dict` describes."""
        return cls(
            state["steps"].tolist(),
            state["seconds"].tolist(),
            [counts.cpu() for block in state["counts"] for counts in block.unbind()],
        )

    def table(self, ledger: StepLedger, peak_flops: float | None) -> Table:
        """One row per step and rank, by column; see `token_report.COLUMNS`.

        Args:
            ledger: Has the weights of the ranks and the operations of the model.
            peak_flops: Operations per second of one device. Without it, ``mfu`` is NaN.
        """
        self.flush()
        columns: dict[str, list[NDArray[np.float64]]] = {}
        for step, seconds, counts in zip(self.steps, self.seconds, self.counts, strict=True):
            for name, values in _rows(step, seconds, counts.numpy(), ledger, peak_flops).items():
                columns.setdefault(name, []).append(np.broadcast_to(values, len(counts)))
        return {name: np.concatenate(parts) for name, parts in columns.items()}


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
