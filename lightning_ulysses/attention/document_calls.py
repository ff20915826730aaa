"""Divides packed documents among calls of a variable-length kernel, once for each batch.

Sources: flash-attn ``csrc/flash_attn/src/flash_fwd_launch_template.h`` (blocks of a call) and ``flash_api.cpp``
(``dq_accum``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lightning_ulysses.attention.rows import live_batch
from lightning_ulysses.geometry.layout import Runs

# Tokens of a document that one block of the kernel computes.
_BLOCK = 128
# Documents are an axis of the kernel's grid, whose second axis ends here.
_MOST = 65_535
# Each document takes blocks for the longest one of its call. So many empty ones cost about as much as another call.
_EMPTY = 4096
# In the backward, each document takes this package's share of a float32 buffer with up to `_BLOCK` further tokens. With
# fewer documents than tokens / `_BLOCK` in a call, the buffer is twice as large as the call's tokens at most.
_FEW = 256


@dataclass(frozen=True)
class DocumentCall:
    """Consecutive documents that one call of the kernel computes.

    Attributes:
        tokens: Their tokens.
        longest: Tokens of the longest one.
        edges: (documents + 1,) int32, where each begins among these tokens, and where the last one ends.
    """

    tokens: int
    longest: int
    edges: Tensor


def divide(lengths: list[int]) -> list[int]:
    """Numbers of consecutive documents for each call, so that a call neither exceeds the grid nor is mostly empty.

    Example:
        [100_000, 10, 10, ..., 10] becomes a call of a few documents, and one of the short ones.

    Args:
        lengths: Tokens of each document.
    """
    most = min(_MOST, max(_FEW, sum(lengths) // _BLOCK))
    counts, count, longest, needed = [], 0, 0, 0
    for length in lengths:
        blocks = -(-length // _BLOCK)
        empty = (count + 1) * max(longest, blocks) - needed - blocks
        # Also not for a few: up to as many empty blocks as others cost less than another call.
        if count and (count == most or empty > max(_EMPTY, needed + blocks)):
            counts.append(count)
            count = longest = needed = 0
        count, longest, needed = count + 1, max(longest, blocks), needed + blocks
    return [*counts, count]


def _prepare(rows: list[Runs], batch: int, length: int, device: torch.device) -> list[DocumentCall]:
    all_rows = rows if len(rows) == batch else rows * batch
    lengths = [end - begin for documents in all_rows for begin, end in documents]
    groups = [lengths[begin:end] for begin, end in pairwise(accumulate(divide(lengths), initial=0))]
    # Those of all calls travel together.
    edges = torch.tensor([edge for group in groups for edge in accumulate(group, initial=0)], dtype=torch.int32)
    # Pinned memory: a copy from pageable memory would wait for everything that is queued on the GPU.
    edges = edges.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else edges
    parts = edges.split([len(group) + 1 for group in groups])
    return [DocumentCall(sum(group), max(group), part) for group, part in zip(groups, parts, strict=True)]


@dataclass
class DocumentCalls:
    """A note on a batch: the calls for rows of documents, which all layers share."""

    known: dict[tuple[object, ...], tuple[list[Runs], list[DocumentCall]]] = field(default_factory=dict)


def calls_on(rows: list[Runs], batch: int, length: int, device: torch.device) -> list[DocumentCall]:
    """The calls for the documents of a batch, built once for each batch and device.

    Args:
        rows: The documents of each row, or of the first row if all are equal.
        batch: B.
        length: S.
        device: Where the kernel runs.
    """
    live = live_batch()
    if live is None:
        return _prepare(rows, batch, length, device)
    known = live.notes.of(DocumentCalls).known
    # By identity: hashing thousands of documents in each layer would cost what this saves.
    key = (tuple(id(documents) for documents in rows), batch, length, device)
    if key not in known:
        # Together with what the key names, so that nothing else gets its place in memory.
        known[key] = rows, _prepare(rows, batch, length, device)
    return known[key][1]
