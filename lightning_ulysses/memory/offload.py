"""What checkpointed blocks keep for the backward waits in host memory.

While a block runs, what the block before it keeps is copied to the host; in the backward it is fetched while the block
behind it runs. The last block's stays on the device. Copies run on a stream of their own.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.memory.host import HostPool, allocate, footprint
from lightning_ulysses.notes import StorageTable, version

# Smaller tensors stay on the device: a copy would take longer than it is worth.
_LEAST = 2**16


class Copies(Protocol):
    """Copies between a device and its host, beside what the device computes."""

    def start(self, target: Tensor, source: Tensor) -> Any:
        """Begins a copy that sees everything the device was given to compute so far; what `wait` takes."""

    def wait(self, copy: Any) -> None:
        """Has what the device computes from now on see the copy."""

    def buffer(self, size: int) -> Tensor:
        """A buffer (bytes,) on the host."""

    def footprint(self, size: int) -> int:
        """Bytes that a buffer takes."""


class PlainCopies:
    """Copies on the host itself, which are done at once."""

    def start(self, target: Tensor, source: Tensor) -> None:
        """See `Copies`."""
        target.copy_(source)

    def wait(self, copy: Any) -> None:
        """See `Copies`."""

    def buffer(self, size: int) -> Tensor:
        """See `Copies`."""
        return allocate(size, torch.device("cpu"))

    def footprint(self, size: int) -> int:
        """See `Copies`."""
        return size


class StreamCopies:
    """Copies on a stream of their own, from and to pinned memory.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def start(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        """See `Copies`."""
        # Memory of the target may belong to something that is still computed, and the source may be.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, copy: torch.cuda.Event) -> None:
        """See `Copies`."""
        torch.cuda.current_stream(self._device).wait_event(copy)

    def buffer(self, size: int) -> Tensor:
        """See `Copies`."""
        return allocate(size, self._device)

    def footprint(self, size: int) -> int:
        """See `Copies`."""
        return footprint(size, self._device)


def copies_for(device: torch.device) -> Copies:
    """How to copy to the host of a device."""
    return StreamCopies(device) if device.type == "cuda" else PlainCopies()


class Kept:
    """A tensor that waits for the backward: on the device, in host memory, or in both while it is copied.

    Args:
        tensor: The tensor.
        group: What is kept of the same block.
        copies: How to copy.
        pool: Buffers on the host.
    """

    def __init__(self, tensor: Tensor, group: _Group, copies: Copies, pool: HostPool) -> None:
        self._tensor: Tensor | None = tensor
        self._group = group
        self._copies, self._pool = copies, pool
        self._version = version(tensor)
        self._layout = (tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype)
        # Dense, whatever the strides of the tensor.
        like = torch.empty_like(tensor, device="meta")
        self._shape, self._stride, self._dtype = like.shape, like.stride(), like.dtype
        self.device = tensor.device
        self._buffer: Tensor | None = None
        # A tensor on its way back, and the last copy.
        self._coming: Tensor | None = None
        self._copy: Any = None

    @property
    def size(self) -> int:
        """Its bytes."""
        return self._shape.numel() * self._dtype.itemsize

    def holds(self, tensor: Tensor) -> bool:
        """Whether it stands for ``tensor``, which has the same storage."""
        layout = (tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype)
        return self._layout == layout and version(tensor) == self._version

    def _on_host(self) -> Tensor:
        assert self._buffer is not None
        return self._buffer[: self.size].view(self._dtype).as_strided(self._shape, self._stride)

    def _check(self, tensor: Tensor) -> Tensor:
        if version(tensor) != self._version:
            raise UlyssesError(
                f"a tensor {tuple(tensor.shape)} that was written to after a checkpointed block had kept it",
                "the values that it had in the forward",
                "write x = x + y in place of x += y in the block or behind it, or leave the block out of "
                "checkpoint_blocks",
            )
        return tensor

    def leave(self) -> None:
        """Begins the copy to the host."""
        if self._buffer is None and self._tensor is not None:
            self._buffer = self._pool.take(self.size)
            self._copy = self._copies.start(self._on_host(), self._check(self._tensor))

    def settle(self) -> None:
        """Frees the memory on the device, once the copy is there."""
        if self._buffer is not None and self._tensor is not None:
            self._copies.wait(self._copy)
            self._check(self._tensor)
            self._tensor = None

    def fetch(self) -> None:
        """Begins the copy back to the device."""
        if self._tensor is None and self._coming is None:
            self._coming = torch.empty_strided(self._shape, self._stride, dtype=self._dtype, device=self.device)
            self._copy = self._copies.start(self._coming, self._on_host())

    def get(self) -> Tensor:
        """The tensor on the device; what the block before keeps begins to come back as well."""
        if self._tensor is None:
            self.fetch()
            self._copies.wait(self._copy)
            self._tensor, self._coming = self._coming, None
            self._version = version(self._tensor)  # type: ignore[arg-type]
        if self._group.previous is not None:
            self._group.previous.fetch()
        assert self._tensor is not None
        return self._check(self._tensor)

    def __del__(self) -> None:
        if self._buffer is not None and not sys.is_finalizing():
            # A later user of the memory on the device must not be overwritten by it. Copies follow one another, so the
            # buffer is free for the next one.
            self._copies.wait(self._copy)
            self._pool.give(self._buffer)


class _Group:
    """What one call of a block keeps. Whoever is to use a tensor in the backward holds it, and not the group."""

    def __init__(self, previous: _Group | None) -> None:
        self.previous = previous
        self._members: list[weakref.ref[Kept]] = []

    def add(self, kept: Kept) -> None:
        self._members.append(weakref.ref(kept))

    def members(self) -> list[Kept]:
        return [kept for reference in self._members if (kept := reference()) is not None]

    def fetch(self) -> None:
        for kept in self.members():
            kept.fetch()


class HostOffload:
    """Keeps tensors of checkpointed blocks for the backward.

    Args:
        blocks: Blocks of the model.
        check: Refuses so many bytes on the host.
        copies: How to copy, for the device of what is kept.
    """

    def __init__(
        self, blocks: int, check: Callable[[int], None], copies: Callable[[torch.device], Copies] | None = None
    ) -> None:
        self._find_copies = copies or copies_for
        self._copies: Copies | None = None
        self._pool: HostPool | None = None
        self._blocks = blocks
        self._check = check
        self._checked = 0
        self._last: _Group | None = None
        self._wanted: StorageTable[None] = StorageTable()
        # Tensors that several blocks get, such as the output of an encoder.
        self._known: StorageTable[list[weakref.ref[Kept]]] = StorageTable()

    def begin(self, wanted: Iterable[Tensor]) -> None:
        """Before a block runs: what the block before keeps begins to leave.

        Args:
            wanted: The inputs of the block that `pack` takes.
        """
        last = self._last
        if last is not None:
            members = last.members()
            self._make_room(members)
            for kept in members:
                kept.leave()
            last = last if members else None
        self._last = _Group(last)
        self._wanted = StorageTable()
        for tensor in wanted:
            self._wanted[tensor] = None

    def end(self) -> None:
        """After a block: what the block before keeps is on the host."""
        if self._last is not None and self._last.previous is not None:
            for kept in self._last.previous.members():
                kept.settle()

    def pool(self, device: torch.device) -> tuple[Copies, HostPool]:
        """How to copy from a device, and the buffers on the host."""
        if self._copies is None or self._pool is None:
            self._copies = self._find_copies(device)
            self._pool = HostPool(self._copies.buffer, self._check)
        return self._copies, self._pool

    def _make_room(self, members: list[Kept]) -> None:
        if not members:
            return
        copies, pool = self.pool(members[0].device)
        sizes = [kept.size for kept in members]
        needed = sum(map(copies.footprint, sizes)) * (self._blocks - 1)
        if needed <= self._checked:
            return
        self._check(needed - pool.bytes)
        self._checked = needed
        # All of it now: a machine that has it no longer later would end the run in the middle of a step.
        buffers = [pool.take(size) for size in sizes * (self._blocks - 1)]
        for buffer in buffers:
            pool.give(buffer)

    def pack(self, tensor: Tensor) -> Any:
        """What stands for an input of a block; `unpack` gives the tensor back."""
        return self.keep(tensor) if tensor in self._wanted else tensor

    def keep(self, tensor: Tensor) -> Any:
        """What stands for a tensor; `unpack` gives the tensor back."""
        if self._last is None or tensor.numel() * tensor.element_size() < _LEAST:
            return tensor
        others = [kept for reference in self._known.get(tensor) or () if (kept := reference()) is not None]
        same = next((kept for kept in others if kept.holds(tensor)), None)
        if same is not None:
            return same
        kept = Kept(tensor.detach(), self._last, *self.pool(tensor.device))
        self._last.add(kept)
        self._known[tensor] = [weakref.ref(each) for each in (*others, kept)]
        return kept

    def unpack(self, kept: Any) -> Tensor:
        """The tensor on its device."""
        return kept.get() if isinstance(kept, Kept) else kept
