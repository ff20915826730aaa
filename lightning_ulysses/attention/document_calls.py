"""Divides packed documents among calls of a variable-length kernel, once for each batch.

Sources: flash-attn ``csrc/flash_attn/src/flash_fwd_launch_template.h`` (blocks of a call) and ``flash_api.cpp``
(``dq_accum``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lightning_ulysses.attention.rows import live_batch, parts_of
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
        key_tokens: The same for keys, of which a run of queries has more. With as many they are the same object.
        longest_key: Keys of the document with the most.
        key_edges: (documents + 1,) int32.
    """

    tokens: int
    longest: int
    edges: Tensor
    key_tokens: int
    longest_key: int
    key_edges: Tensor


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


def _groups(values: list[int], counts: list[int]) -> list[list[int]]:
    return [values[begin:end] for begin, end in pairwise(accumulate(counts, initial=0))]


def _on_device(groups: list[list[int]], device: torch.device) -> list[Tensor]:
    """Where documents of each group begin and end. Those of all groups travel together."""
    edges = torch.tensor([edge for group in groups for edge in accumulate(group, initial=0)], dtype=torch.int32)
    # Pinned memory: a copy from pageable memory would wait for everything that is queued on the GPU.
    edges = edges.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else edges
    return list(edges.split([len(group) + 1 for group in groups]))


def _prepare(
    rows: list[Runs], batch: int, queries: tuple[int, int], causal: bool, device: torch.device
) -> tuple[list[DocumentCall], Runs]:
    cut = [parts_of(documents, *queries, causal) for documents in rows]
    seen = tuple((parts[0].begin, parts[-1].begin + parts[-1].keys) for parts in cut)
    parts = [part for row in (cut if len(cut) == batch else cut * batch) for part in row]
    counts = divide([part.queries for part in parts])
    groups, key_groups = (
        _groups(lengths, counts) for lengths in ([part.queries for part in parts], [part.keys for part in parts])
    )
    edges = _on_device(groups, device)
    key_edges = edges if key_groups == groups else _on_device(key_groups, device)
    calls = [
        DocumentCall(sum(group), max(group), edge, sum(keys), max(keys), key_edge)
        for group, edge, keys, key_edge in zip(groups, edges, key_groups, key_edges, strict=True)
    ]
    return calls, seen


@dataclass
class DocumentCalls:
    """A note on a batch: the calls for rows of documents, which all layers share."""

    known: dict[tuple[object, ...], tuple[list[Runs], tuple[list[DocumentCall], Runs]]] = field(default_factory=dict)


def calls_on(
    rows: list[Runs], batch: int, queries: tuple[int, int], causal: bool, device: torch.device
) -> tuple[list[DocumentCall], Runs]:
    """The calls for the documents of a batch, built once for each batch and device.

    Args:
        rows: The documents of each row, or of the first row if all are equal.
        batch: B.
        queries: The run of queries, (first, last + 1).
        causal: Whether queries see no later keys.
        device: Where the kernel runs.

    Returns:
        The calls, and for each row the run of keys that they are about.
    """
    live = live_batch()
    if live is None:
        return _prepare(rows, batch, queries, causal, device)
    known = live.notes.of(DocumentCalls).known
    # By identity: hashing thousands of documents in each layer would cost what this saves.
    key = (tuple(id(documents) for documents in rows), batch, queries, causal, device)
    if key not in known:
        # Together with what the key names, so that nothing else gets its place in memory.
        known[key] = rows, _prepare(rows, batch, queries, causal, device)
    return known[key][1]
