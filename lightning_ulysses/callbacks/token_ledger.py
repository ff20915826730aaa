"""Counts the tokens in each rank's slices of an optimizer step, and exchanges the counts in one small collective."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_ulysses.context import LocalBatch
from lightning_ulysses.cost.flops import ModelOperations
from lightning_ulysses.exchange.gather import gather_single
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.batch_keys import MASK_KEYS
from lightning_ulysses.geometry.layout import Runs, SequenceLayout
from lightning_ulysses.geometry.shares import even_shares
from lightning_ulysses.regions.notes import split_layout

FIELDS = ("loss", "targets", "tokens", "padding", "documents", "pairs", "work", "peak_bytes")
LOSS, TARGETS, TOKENS, PADDING, DOCUMENTS, PAIRS, WORK, PEAK = range(len(FIELDS))

_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SliceCounts:
    """Counts of one rank's slice of a batch that follow from the layout alone.

    Attributes:
        tokens: Tokens of the slice, B * S_r, with padding.
        real: Tokens of the slice that are no padding according to the layout.
        documents: Documents whose first token is in the slice.
        pairs: Sum over the real tokens of the slice of the length of their document.
        squares: Sum of the squared document lengths of the whole batch, as attention computes them, with padding.
        tails: (B, 4) for each row its last document, if the row has several. The columns are where it begins in the
            slice, and how much it adds to ``real``, ``documents`` and ``pairs``. Empty if no row has several.
    """

    tokens: float
    real: float
    documents: float
    pairs: float
    squares: float
    tails: _Floats


def _tokens_before(valid: Runs | None, end: int, positions: _Floats) -> _Floats:
    """The number of real tokens of a row before each position."""
    if valid is None:
        return np.minimum(positions, end)
    runs = np.array(valid, dtype=np.float64).reshape(-1, 2)
    if not len(runs):
        return np.zeros_like(positions)
    kept = np.cumsum(runs[:, 1] - runs[:, 0])
    # Piecewise linear: it grows by one per token within a run, and is constant between runs.
    return np.interp(positions, runs.ravel(), np.stack([np.append(0, kept[:-1]), kept], axis=1).ravel())


def count_slice(layout: SequenceLayout, rows: int, rank: int) -> SliceCounts:
    """Counts a rank's slice, on the host.

    Args:
        layout: The geometry of the batch.
        rows: B.
        rank: Rank in the sequence-parallel group.
    """
    span, end = layout.spans[rank], layout.real_len
    sums, squares, tails = np.zeros(3), 0.0, []
    for row in range(rows):
        runs = np.array(
            layout.documents[row] if layout.documents is not None else ((0, layout.seq_len),), dtype=np.float64
        )
        squares += float(np.square(runs[:, 1] - runs[:, 0]).sum())
        if end < layout.seq_len:
            runs = runs[runs[:, 0] < end]
        valid = layout.valid[row] if layout.valid is not None else None
        # (documents, 2): real tokens before each document's begin and end, and before those of its part in the slice.
        whole = _tokens_before(valid, end, runs)
        part = _tokens_before(valid, end, np.minimum(np.maximum(runs, span.start), span.stop))
        own = part[:, 1] - part[:, 0]
        each = np.empty((len(runs), 3))
        each[:, 0] = own
        each[:, 1] = (own > 0) & (part[:, 0] == whole[:, 0])
        each[:, 2] = own * (whole[:, 1] - whole[:, 0])
        sums += each.sum(axis=0)
        several = len(runs) > 1 and layout.valid is None
        begin = max(runs[-1, 0] - span.start, 0.0) if several else layout.shares[rank]
        tails.append([begin, *(each[-1] if several else np.zeros(3))])
    table = np.array(tails, dtype=np.float64).reshape(-1, 4)
    tokens, (real, documents, pairs) = float(rows * (span.stop - span.start)), sums.tolist()
    return SliceCounts(tokens, real, documents, pairs, squares, table if table[:, 1].any() else table[:0])


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copies from the host without waiting for the work queued on the device."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def find_padding(
    tails: _Floats, live: LocalBatch, name: str | None, end: int, ignore_index: int, rank: int = 0
) -> Tensor | None:
    """Finds padding that a collate function put into a document of its own at the end of a row.

    It is recognized by its tokens: one repeated token without a single target. Each rank judges its own part of the
    document, so no collective is needed.

    Args:
        tails: See `SliceCounts`.
        live: The batch.
        name: The tensor with the targets.
        end: Tokens of the slice that the strategy did not add.
        ignore_index: The label that is no target.
        rank: Rank in the sequence-parallel group.

    Returns:
        (3,) on the device: padding, documents and pairs that `count_slice` counted as real. None if no row can have
        such padding.
    """
    tokens, targets = live.own("input_ids", rank), live.own(name or "", rank)
    if not len(tails) or tokens is None or targets is None or tokens.dim() != 2 or targets.shape != tokens.shape:
        return None
    begin = int(tails[:, 0].min())
    # (B, S_r) -> (B, T), where T spans the last document of every row
    tokens, targets = tokens[:, begin:end], targets[:, begin:end]
    other = tokens != tokens[:, -1:]
    # A slice without any target contains a stand-in for the module, which is no target here.
    if live.counts.get(name or ""):
        other = other | (targets != (0 if name in MASK_KEYS else ignore_index))
    table = to_device(torch.from_numpy(tails), tokens.device)
    inside = torch.arange(begin, end, device=tokens.device) >= table[:, :1]
    padded = ~(other & inside).any(dim=1, keepdim=True)
    return (table[:, 1:] * padded).sum(dim=0)


def peak_bytes(device: torch.device) -> float:
    """Peak memory of this process so far: allocated by torch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    # ru_maxrss is in kilobytes on Linux, in bytes on macOS.
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


class StepLedger:
    """Sums the counts of the micro-batches of an optimizer step, and exchanges the sums.

    Args:
        mesh: Sizes and groups.
        device: The device of the collectives.
        ignore_index: The label that is no target.
        operations: The operations of the model.
        by_targets: Whether the loss weights ranks by their number of targets. Otherwise all ranks weigh the same.
    """

    def __init__(
        self,
        mesh: SequenceMesh,
        device: torch.device,
        ignore_index: int,
        operations: ModelOperations,
        by_targets: bool = True,
    ) -> None:
        self.operations = operations
        self.by_targets = by_targets
        self._mesh = mesh
        self._device = device
        self._ignore_index = ignore_index
        # Attention is split by heads, everything else by tokens. Ranks with the same heads divide the queries.
        self._head_share = 1 / mesh.sp_size
        if operations.heads:
            ranks = mesh.head_ranks(operations.heads)
            share = even_shares(operations.heads, ranks)[mesh.sp_rank % ranks]
            self._head_share *= share * ranks / operations.heads
        self._sums = np.zeros(len(FIELDS))
        self._padding: Tensor | None = None

    def add(self, live: LocalBatch, name: str | None) -> None:
        """Adds a micro-batch; ``name`` is the tensor with its targets."""
        layout, rank = split_layout(live), self._mesh.sp_rank
        counts = count_slice(layout, live.rows, rank)
        name = name if name is not None else next((key for key in ("shift_labels", "labels") if key in live.counts), "")
        work = self.operations.of(counts.tokens, counts.squares * self._head_share)
        self._sums += (
            0.0,
            live.counts.get(name, 0.0),
            counts.tokens,
            counts.tokens - counts.real,
            counts.documents,
            counts.pairs,
            work,
            0.0,
        )
        end = min(layout.shares[rank], layout.real_len - layout.starts[rank])
        found = find_padding(counts.tails, live, name, end, self._ignore_index, rank)
        if found is not None:
            self._padding = found if self._padding is None else self._padding + found

    def close(self, own_loss: Tensor) -> Tensor:
        """Ends the step; a collective.

        Args:
            own_loss: This rank's part of the loss, one element.

        Returns:
            (W, fields) float64 on the device, the same on every rank; see `FIELDS`.
        """
        self._sums[PEAK] = peak_bytes(self._device)
        mine = to_device(torch.from_numpy(self._sums), self._device).clone()
        if self._padding is not None:
            mine[PADDING] += self._padding[0]
            mine[DOCUMENTS : PAIRS + 1] -= self._padding[1:]
        mine[LOSS] = own_loss
        everyone = gather_single(mine)
        self._sums, self._padding = np.zeros(len(FIELDS)), None
        # (W * fields,) -> (W, fields)
        return everyone.unflatten(0, (-1, len(FIELDS)))
