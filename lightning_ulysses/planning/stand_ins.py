"""What stands for devices, groups and values where tensors have no memory."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ulysses.attention import device, kernel, repeated
from lightning_ulysses.attention.chunked_call import ChunkedCall
from lightning_ulysses.exchange.gather import name_of_gather
from lightning_ulysses.geometry.head_chunks import HeadChunk
from lightning_ulysses.interceptors import highest_position
from lightning_ulysses.memory import checkpoint, checkpointed, head, offload, tiled, tiled_loss
from lightning_ulysses.memory.host import footprint
from lightning_ulysses.memory.tiles import as_call
from lightning_ulysses.memory.trying import run_rows
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.regions import hooks

# The package has a function of this name.
_ATTEND = importlib.import_module("lightning_ulysses.attention.attend")
_FIRST, _GRADIENTS = ChunkedCall.first, ChunkedCall.gradients
# Key/value heads of an attention call whose chunks run. From the second one on there are gradients of keys, and only
# before the last one do more keys arrive.
_HEADS = 3
_COLLECTIVES = ("all_to_all_single", "all_gather", "all_reduce", name_of_gather())
#: The device that is stood for.
CUDA = torch.device("cuda")


class AbsentGroup:
    """A group of which this process is one rank, and whose other ranks are absent: nothing is sent."""

    def __init__(self, ranks: int = 1) -> None:
        self._ranks = ranks

    def size(self) -> int:
        """How many ranks there are."""
        return self._ranks

    def wait(self) -> None:
        """Ends a collective."""

    @classmethod
    def of(cls, ranks: list[int], **kwargs: Any) -> AbsentGroup:
        """Stands for a new group."""
        return cls(len(ranks))

    @classmethod
    def collective(cls, *args: Any, **kwargs: Any) -> AbsentGroup:
        """Stands for a collective, which fills tensors that its caller has made."""
        return cls()


class HostBytes:
    """Copies to a host that has no memory: their buffers are counted.

    Attributes:
        sizes: Of all buffers, before `memory.host` rounds them, and how many there are of each.
    """

    def __init__(self) -> None:
        self.sizes: Counter[int] = Counter()

    def start(self, target: Tensor, source: Tensor) -> None:
        """See `memory.offload.Copies`."""

    def wait(self, copy: Any) -> None:
        """See `memory.offload.Copies`."""

    def buffer(self, size: int) -> Tensor:
        """See `memory.offload.Copies`."""
        self.sizes[size] += 1
        return torch.empty(self.footprint(size), dtype=torch.uint8, device="meta")

    def footprint(self, size: int) -> int:
        """See `memory.offload.Copies`."""
        return footprint(size, CUDA)


def _is_gpu(tensor: Tensor) -> bool:
    return True


def _has_flash(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


def _kernel_name(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> str:
    return "flash" if _has_flash(q) and settings.get("attn_mask") is None else "efficient"


def _kept_by_row(part: str, name: str, module: nn.Module, call: Callable[[Tensor], Any], x: Tensor) -> int:
    """`memory.trying.try_rows` without comparing, for which values are needed."""
    rows = 12
    _, kept = run_rows(module, call, as_call(x.new_zeros(rows, x.shape[-1]), x.dim()))
    return max(kept // rows, 1)


def _every_row(target: Tensor, ignore_index: int) -> Tensor:
    """`memory.tiled_loss.with_target` where every row has one."""
    return torch.arange(len(target), device=target.device)


def _some(spans: Callable[[int, int], list[tuple[int, int]]]) -> Callable[[int, int], list[tuple[int, int]]]:
    # The second tile finds what the first one leaves; the others take no more than it.
    return lambda rows, size: spans(rows, size)[:2]


def _telling(call: ChunkedCall) -> tuple[HeadChunk, ...]:
    """The chunks that run of an attention call. The others take no more, beside what is kept of each."""
    found: list[HeadChunk] = []
    heads, before = 0, None
    for chunk in call.chunks:
        parts = chunk.query_ranges, chunk.kv_ranges, chunk.new_ranges, chunk.done_ranges
        sizes = [[last - first for first, last in ranges] for ranges in parts]
        # Between the first chunk of a key/value head and its last one, all are alike.
        if sizes == before and not any(sizes[2] + sizes[3]):
            continue
        found.append(chunk)
        heads, before = heads + call.num_done(chunk), sizes
        if heads >= _HEADS and len(found) >= _HEADS:
            break
    return tuple(found)


def _some_first(call: ChunkedCall, inputs: Any, *, keeps: bool) -> tuple[Tensor, list[Tensor]]:
    chunks = _telling(call)
    out, kept = _FIRST(replace(call, chunks=chunks), inputs, keeps=keeps)
    more = range(len(chunks), len(call.chunks)) if keeps else ()
    return out, kept + [torch.empty_like(each) for _ in more for each in kept[-call.traces[-1].num_kept :]]


def _some_gradients(call: ChunkedCall, *args: Any) -> list[Tensor | None]:
    return _GRADIENTS(replace(call, chunks=_telling(call)), *args)


def _unchecked(block: checkpointed.CheckpointedBlock) -> AbstractContextManager[None]:
    return nullcontext()


def _forget(surroundings: Any) -> None:
    surroundings._random = None


@contextmanager
def on_fake_tensors(host: HostBytes, *, all_tiles: bool = False) -> Iterator[None]:
    """Has the package take a GPU's paths on fake tensors of a CPU, and nothing ask for their values.

    Args:
        host: Takes what is offloaded.
        all_tiles: Whether every tile and every chunk of heads runs.
    """
    handle = Handle()
    try:
        for collective in _COLLECTIVES:
            handle.patch(dist, collective, AbsentGroup.collective)
        handle.patch(dist, "new_group", AbsentGroup.of)
        handle.patch(hooks, "check_same_inputs", lambda mesh, name, leaves: None)
        handle.patch(highest_position, "_tried", lambda module, name: None)
        handle.patch(device, "is_gpu", _is_gpu)
        handle.patch(device, "has_flash", _has_flash)
        handle.patch(kernel, "sdpa_kernel_name", _kernel_name)
        handle.patch(_ATTEND, "own_draws", lambda mesh, device: nullcontext())
        handle.patch(repeated._Surroundings, "forget_unused", _forget)
        handle.patch(offload, "copies_for", lambda device: host)
        handle.patch(checkpoint, "check_room", lambda each, processes: None)
        handle.patch(checkpointed.CheckpointedBlock, "checked", _unchecked)
        handle.patch(tiled, "try_rows", _kept_by_row)
        handle.patch(head, "try_rows", _kept_by_row)
        handle.patch(tiled_loss, "with_target", _every_row)
        masks: Any = sys.modules.get("transformers.masking_utils")
        if masks is not None:
            # It would build a mask of S x S where it cannot read positions.
            handle.patch(masks, "find_packed_sequence_indices", lambda position_ids: None)
        if not all_tiles:
            handle.patch(ChunkedCall, "first", _some_first)
            handle.patch(ChunkedCall, "gradients", _some_gradients)
            handle.patch(tiled, "spans", _some(tiled.spans))
            handle.patch(tiled_loss, "spans", _some(tiled_loss.spans))
        yield
    finally:
        handle.remove()
