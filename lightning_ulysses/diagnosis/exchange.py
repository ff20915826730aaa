"""Runs an exchange and a training step on the devices that are there, for about half a minute."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ulysses.diagnosis.finding import Finding, size
from lightning_ulysses.geometry.distance import largest
from lightning_ulysses.sequence import sequence_positions
from lightning_ulysses.testing.processes import ProcessPool, RemoteError
from lightning_ulysses.testing.runs import SplitRun, compare, fit_single, fit_split

# Bytes that a rank sends in one all-to-all, and seconds of sending.
_BYTES, _SECONDS = 16 * 2**20, 3.0
# A GPU adds up in another order than the CPU that computes the reference.
_BOUNDS = {"cpu": 1e-5, "cuda": 1e-4}


class TinyGPT(pl.LightningModule):
    """Two heads, one layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.place = nn.Embedding(61, 16), nn.Embedding(64, 16)
        self.qkv, self.head = nn.Linear(16, 48), nn.Linear(16, 61)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The mean cross entropy of a batch of tokens and targets."""
        tokens, targets = batch
        hidden = self.embed(tokens) + self.place(sequence_positions(tokens))
        # (B, S, 3 * H * D) -> (B, S, 3, H, D) -> three of (B, H, S, D)
        q, k, v = self.qkv(hidden).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        # (B, H, S, D) -> (B, S, H * D)
        hidden = hidden + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD, so that a wrong gradient shows."""
        return torch.optim.SGD(self.parameters(), lr=1.0)


def count_targets(batch: tuple[Tensor, Tensor]) -> float:
    """Targets of a batch of `TinyGPT`."""
    return float(batch[1].numel())


def _send(rank: int, world_size: int, device_type: str) -> tuple[float, bool]:
    """Seconds of one all-to-all, and whether everything arrived where it belongs."""
    if device_type == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    device = torch.device("cuda", rank) if device_type == "cuda" else torch.device("cpu")
    mine = torch.arange(world_size, device=device).repeat_interleave(_BYTES // 4 // world_size)
    mine = (mine + rank * world_size).float()
    received = torch.empty_like(mine)
    times = []
    deadline = time.monotonic() + _SECONDS
    # Ranks look at their own clocks, so rank 0 says when it is enough.
    more = torch.ones(1, device=device)
    while more.item():
        begin = time.perf_counter()
        dist.all_to_all_single(received, mine)
        if device_type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
        more.fill_(float(time.monotonic() < deadline))
        dist.broadcast(more, 0)
    # (W, elements of a chunk): the chunk that rank `sender` addressed to this one
    chunks = received.view(world_size, -1)
    wanted = torch.arange(world_size, device=device, dtype=torch.float32) * world_size + rank
    return sorted(times)[len(times) // 2], bool((chunks == wanted[:, None]).all())


def _explain(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)


def exchange(pool: ProcessPool, device_type: str) -> Finding:
    """An all-to-all over all processes of a pool.

    Args:
        pool: One process for each device.
        device_type: ``"cuda"`` or ``"cpu"``.
    """
    name = f"all-to-all, {pool.size} {device_type} processes"
    try:
        results = pool.run(_send, pool.size, device_type, world_size=pool.size)
    except (RemoteError, TimeoutError) as failure:
        hint = "run it with NCCL_DEBUG=INFO" if device_type == "cuda" else "look at the firewall of localhost"
        return Finding(name, f"failed: {_explain(failure)}", hint)
    seconds = max(each for each, _ in results)
    if not all(good for _, good in results):
        return Finding(name, "data arrived that was not sent", "do not train here: memory or a link is broken")
    # What stays on the rank itself is not sent.
    rate = _BYTES * (pool.size - 1) / pool.size / seconds
    return Finding(name, f"{size(_BYTES)} a rank in {seconds * 1e3:.3g} ms, {size(rate)}/s out of each")


def parity(pool: ProcessPool, device_type: str) -> Finding:
    """One step of a small model, split over the processes of a pool, against one process."""
    sp_size = min(2, pool.size)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 61, (2, 33), generator=generator)
    batch = (tokens, tokens.roll(-1, dims=1))
    run = SplitRun(sp_size, sp_size, {}, {"accelerator": device_type, "logger": False})
    name = f"a step, {sp_size} {device_type} processes"
    try:
        results: list[Any] = fit_split(pool, TinyGPT, [batch], run)
    except (RemoteError, TimeoutError) as failure:
        return Finding(name, f"failed: {_explain(failure)}", "mend what it says; the other findings may be the cause")
    error = largest(compare(each, fit_single(TinyGPT, [[batch]], count_targets)).largest for each in results)
    good = error <= _BOUNDS[device_type]
    mend = None if good else "do not train here; report it with the output of `lightning-ulysses doctor --json`"
    return Finding(name, f"differs from one process by {error:.1e} (bound {_BOUNDS[device_type]:.0e})", mend)
