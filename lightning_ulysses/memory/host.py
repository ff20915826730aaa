"""Host memory: how much of it there is, and buffers in it that are used again."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightning_ulysses.errors import UlyssesError


def available(root: Path = Path("/")) -> int | None:
    """Bytes that this machine could still hand out; None if it does not say.

    Args:
        root: Where ``proc`` is.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def control_group(root: Path = Path("/")) -> tuple[int, int] | None:
    """The smallest memory limit of this process's control groups, and what is used of it, in bytes.

    Args:
        root: Where ``proc`` and ``sys`` are.
    """
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return None
    base, found = root / "sys/fs/cgroup", []
    for _, controllers, path in groups:
        folder = base / ("memory" if controllers else "")
        if controllers and "memory" not in controllers.split(","):
            continue
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        inner = folder / path.strip("/")
        # A container sees its own group at the top.
        for place in (inner, *(parent for parent in inner.parents if folder in (parent, *parent.parents))):
            limit, used = (_number(place / name) for name in names)
            # Without a limit, the first version shows a number near 2^63.
            if limit is not None and limit < 2**60:
                found.append((limit, used or 0))
    return min(found, default=None)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().split()[0]
    except (OSError, IndexError):
        return None
    # "max" stands for no limit.
    return int(text) if text.isdigit() else None


def _gib(number: float) -> str:
    return f"{number / 2**30:.3g} GiB"


def check_room(each: int, processes: int, root: Path = Path("/")) -> None:
    """Refuses to keep on the host what does not fit there.

    Args:
        each: Bytes of one process.
        processes: Processes on this machine.
        root: Where ``proc`` and ``sys`` are.

    Raises:
        UlyssesError: With the numbers.
    """
    needed, limits = each * processes, dict[str, int]()
    if (free := available(root)) is not None:
        limits["of available memory"] = free
    if (limited := control_group(root)) is not None:
        limits["left below the memory limit of the container or job"] = max(limited[0] - limited[1], 0)
    short = min(limits, key=lambda name: limits[name], default=None)
    if short is not None and limits[short] < needed:
        raise UlyssesError(
            f"offload='cpu' of {_gib(each)} for each of {processes} processes on a machine with "
            f"{_gib(limits[short])} {short}",
            f"at least {_gib(needed)}",
            "raise sp_size, shorten sequences, set checkpoint='block' where it is 'block+attention', or drop offload",
        )


class HostPool:
    """Buffers in host memory. There are never more of them than were in use at a time.

    Args:
        allocate: Makes a buffer of so many bytes.
        check: Refuses so many further bytes.

    Attributes:
        made: Buffers allocated so far.
        bytes: Of all buffers, in use or not.
    """

    def __init__(self, allocate: Callable[[int], Tensor], check: Callable[[int], None]) -> None:
        self._allocate = allocate
        self._check = check
        self._free: list[Tensor] = []
        self.made = 0
        self.bytes = 0

    @property
    def free(self) -> int:
        """Buffers that are not in use."""
        return len(self._free)

    def take(self, size: int) -> Tensor:
        """A buffer (bytes,) of at least ``size`` bytes.

        Raises:
            UlyssesError: If the machine has none.
        """
        self._free.sort(key=len)
        fitting = next((index for index, buffer in enumerate(self._free) if len(buffer) >= size), None)
        if fitting is not None:
            return self._free.pop(fitting)
        if self._free:
            # A longer batch: this buffer would never be used again.
            self.bytes -= len(self._free.pop())
        self._check(size)
        try:
            buffer = self._allocate(size)
        except RuntimeError as error:
            locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            limit = "unlimited" if locked == resource.RLIM_INFINITY else f"{locked} bytes"
            raise UlyssesError(
                f"offload='cpu', and no further buffer of {_gib(size)} beside {_gib(self.bytes)} of pinned host "
                f"memory ({str(error).splitlines()[0]}); the limit of locked memory is {limit}",
                "host memory for what all blocks keep",
                "ulimit -l unlimited (in a container --ulimit memlock=-1), or drop offload",
            ) from None
        self.made += 1
        self.bytes += len(buffer)
        return buffer

    def give(self, buffer: Tensor) -> None:
        """Takes a buffer back."""
        self._free.append(buffer)


def allocate(size: int, device: torch.device) -> Tensor:
    """A buffer (bytes,), pinned where ``device`` is a GPU."""
    return torch.empty(footprint(size, device), dtype=torch.uint8, pin_memory=device.type == "cuda")


def footprint(size: int, device: torch.device) -> int:
    """Bytes that `allocate` takes: torch rounds pinned memory up to a power of two (``CachingHostAllocator``)."""
    return 1 << (size - 1).bit_length() if device.type == "cuda" else size
