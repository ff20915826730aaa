"""Memory limits, build locks and links of this machine."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import torch

from lightning_ulysses.diagnosis.finding import Finding, size
from lightning_ulysses.memory import host
from lightning_ulysses.upstream.torch_builds import build_root

# Pinned memory that offloading needs at least; containers often allow 64 KiB.
_PINNED = 2**30
# A build that has taken longer than this was killed.
_STALE = 1800.0
# Shared memory through which dataloader workers pass batches, and NCCL data inside a node.
_SHARED = 2**30


def memory(root: Path = Path("/")) -> list[Finding]:
    """Host memory, and the limits on it.

    Args:
        root: Where ``proc`` and ``sys`` are.
    """
    found = []
    available = host.available(root)
    if available is not None:
        found.append(Finding("host memory", f"{size(available)} available"))
    limited = host.control_group(root)
    if limited is not None:
        left = limited[0] - limited[1]
        short = available is not None and left < available
        mend = "raise the memory limit of the container or the job: offloading would be killed at it" if short else None
        found.append(Finding("memory limit", f"{size(limited[0])}, of which {size(limited[1])} are used", mend))
    found.append(_locked(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]))
    shared = root / "dev/shm"
    if shared.is_dir():
        state = os.statvfs(shared)
        total = state.f_frsize * state.f_blocks
        mend = "start the container with --ipc=host or --shm-size=16g" if total < _SHARED else None
        found.append(Finding("shared memory", f"{size(total)} in /dev/shm", mend))
    return found


def _locked(limit: int) -> Finding:
    if limit == resource.RLIM_INFINITY:
        return Finding("locked memory", "unlimited")
    mend = "ulimit -l unlimited (in a container --ulimit memlock=-1), which offloading and RDMA need"
    # Without a GPU nothing is pinned.
    is_short = limit < _PINNED and torch.cuda.is_available()
    return Finding("locked memory", f"{size(limit)} (ulimit -l)", mend if is_short else None)


def build_locks(root: Path | None = None) -> list[Finding]:
    """Locks that a killed build of an extension of torch has left: the next one waits for them without a word.

    Args:
        root: Where extensions are built; by default where torch and DeepSpeed build them.
    """
    root = build_root() if root is None else root
    locks = sorted(root.rglob("lock")) if root.is_dir() else []
    found = []
    for lock in locks:
        try:
            age = time.time() - lock.stat().st_mtime
        except OSError:
            continue
        mend = f"rm {lock}" if age > _STALE else f"wait for the build in {lock.parent}, or, if none runs, rm {lock}"
        found.append(Finding("build lock", f"{lock}, {age / 60:.0f} minutes old", mend))
    return found or [Finding("build lock", f"none in {root}")]


def devices() -> list[Finding]:
    """GPUs, NCCL and whether GPUs reach each other directly."""
    if not torch.cuda.is_available():
        return [Finding("devices", f"no GPU; {os.cpu_count()} CPU cores")]
    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
    found = [Finding("devices", f"{count} x {', '.join(names)}")]
    if torch.distributed.is_nccl_available():
        found.append(Finding("nccl", ".".join(map(str, torch.cuda.nccl.version()))))
    else:
        found.append(Finding("nccl", "not in this build of torch", "install torch from its index for CUDA"))
    apart = [(a, b) for a in range(count) for b in range(a) if not torch.cuda.can_device_access_peer(a, b)]
    if count > 1:
        what = f"{len(apart)} of {count * (count - 1) // 2} pairs of GPUs cannot" if apart else "all GPUs can"
        mend = "look at `nvidia-smi topo -m`: all-to-alls would go through the host's memory" if apart else None
        found.append(Finding("links", f"{what} read each other's memory", mend))
    set_here = {name: value for name, value in os.environ.items() if name.startswith("NCCL_")}
    off = [name for name in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE") if set_here.get(name) == "1"]
    if set_here:
        mend = f"unset {' '.join(off)}, unless a link is broken" if off else None
        found.append(Finding("nccl settings", str(set_here), mend))
    return found
