"""Exchange, scan, exchange: each rank scans the whole sequence for its share of the heads, groups or channels.

A causal convolution is not exchanged: it needs the few tokens before the slice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.exchange.all_to_all import heads_to_seq
from lightning_ulysses.exchange.bundle import bundle_to_heads
from lightning_ulysses.exchange.gather import join_sequence
from lightning_ulysses.exchange.halo import Fetch, fetched
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.heads import HeadLayout, head_layout
from lightning_ulysses.mixing.call import MixerCall, as_given, by_heads
from lightning_ulysses.mixing.table import INDEX
from lightning_ulysses.notes import StorageTable, version
from lightning_ulysses.sequence import check_share


@dataclass
class JoinedIndices:
    """A note on a batch: for each tensor (B, S_r) of document numbers the whole one, which all layers ask for."""

    whole: StorageTable[tuple[Any, Tensor]] = field(default_factory=StorageTable)


def whole_index(index: Tensor, batch: LocalBatch, mesh: SequenceMesh) -> Tensor:
    """(B, S_r) -> (B, S), by a collective in the first layer."""
    assert mesh.sp_group is not None
    if index.shape[1] == batch.layout.seq_len:
        return index
    place = version(index), index.storage_offset(), index.stride(), index.shape
    table = batch.notes.of(JoinedIndices).whole
    known = table.get(index)
    if known is None or known[0] != place:
        known = table[index] = place, join_sequence(index, batch.layout.shares, 1, mesh.sp_group)
    return known[1]


def exchanged(call: MixerCall, batch: LocalBatch, context: SequenceContext) -> Tensor:
    """Computes a call over the whole sequence of a batch.

    Args:
        call: The call, on this rank's slice.
        batch: The batch that is split.
        context: Sizes and groups.

    Returns:
        The output for the slice, as the function returns it.

    Raises:
        UlyssesError: If the length is not this rank's share, or the call cannot be exchanged.
    """
    mesh = context.mesh
    check_share(call.lengths[0], batch.layout, mesh.sp_rank, call.name)
    call.check(batch)
    run = _convolved if call.mixer.looks_back else _scanned
    return run(call, batch, context)


def _convolved(call: MixerCall, batch: LocalBatch, context: SequenceContext) -> Tensor:
    mesh, layout, rank = context.mesh, batch.layout, context.mesh.sp_rank
    assert mesh.sp_group is not None
    weight = call.args[1] if len(call.args) > 1 else call.kwargs["weight"]
    seen = tuple((max(span.start - weight.shape[-1] + 1, 0), span.stop) for span in layout.spans)
    fetch = Fetch((*layout.starts, layout.seq_len), seen, rank, mesh.sp_group)
    begin, end = seen[rank]
    # (B, C, S_r)
    x = call.given[call.mixer.like]
    # Kernels ask for one order in memory or the other: (B, S_r, C) -> (B, n + S_r, C) -> (B, C, n + S_r)
    longer = fetched(x.mT, 1, fetch).mT if x.stride(1) == 1 else fetched(x, 2, fetch)
    values: dict[str, Any] = {call.mixer.like: longer}
    index = call.kwargs.get(INDEX)
    if isinstance(index, Tensor):
        values[INDEX] = whole_index(index, batch, mesh)[:, begin:end].contiguous()
    with context.plain():
        # (B, C, n + S_r) -> (B, C, S_r)
        return call.run(values)[:, :, layout.starts[rank] - begin :]


def _scanned(call: MixerCall, batch: LocalBatch, context: SequenceContext) -> Tensor:
    mesh, shares, rank = context.mesh, batch.layout.shares, context.mesh.sp_rank
    assert mesh.sp_group is not None
    sent, dims = call.operands, call.dims
    num_heads = sent[call.mixer.like].shape[1]
    layouts = {name: head_layout(num_heads, part.shape[1], mesh.sp_size, True) for name, part in sent.items()}
    ranges = [layouts[name].query_ranges if "h" in dims[name] else layouts[name].kv_ranges for name in sent]
    found = bundle_to_heads([*sent.values()], ranges, shares, rank, mesh.sp_group)
    parts = {name: _grouped(part, layouts[name], dims[name], rank) for name, part in zip(sent, found, strict=True)}
    heads = layouts[call.mixer.like]
    begin, end = heads.query_ranges[rank]
    # With more ranks than heads some have none to scan, but the exchanges are everybody's.
    out = parts[call.mixer.like]
    if begin < end:
        values = {name: as_given(part, dims[name]) for name, part in parts.items()}
        for name in dims.keys() - sent.keys():
            values[name] = _own_parameter(call.given[name], dims[name], num_heads, begin, end)
        index = call.kwargs.get(INDEX)
        if isinstance(index, Tensor):
            values[INDEX] = whole_index(index, batch, mesh)
        with context.plain():
            out = by_heads(call.run(values), dims[call.mixer.like])
    # (B, H_r, S, D) -> (B, H, S_r, D) -> the caller's order
    return as_given(heads_to_seq(out, heads, shares, rank, mesh.sp_group), dims[call.mixer.like])


def _grouped(part: Tensor, layout: HeadLayout, dims: str, rank: int) -> Tensor:
    """Groups (B, G needed, S, D) as a kernel can use them: (B, H_r, S, D) where heads share them unevenly."""
    index = layout.uneven_groups[rank] if "g" in dims else None
    return part if index is None else part[:, list(index)]


def _own_parameter(tensor: Tensor, dims: str, num_heads: int, begin: int, end: int) -> Tensor:
    """The part of a parameter for heads ``begin`` to ``end``; the gradient of the others is zero here."""
    each = tensor.shape[0] // num_heads
    return tensor[begin * each : end * each] if dims[0] in "hH" else tensor
