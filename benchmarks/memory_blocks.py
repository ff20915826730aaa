"""Processor time and memory of a step of checkpointed blocks, of one of two processes.

Blocks are kept, computed again, with and without their attention, and what is kept is on the host; in turns.

    python benchmarks/memory_blocks.py [--tokens 4096] [--layers 8] [--repeats 2]

Peaks count the storages of one rank that live at a time beside parameters, inputs and buffers on the host. A mean in
place of a loss stands for the rest of the model, so that blocks make up the peak.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from memory_parts import Meter, Mlp
from torch import Tensor, nn

from lightning_ulysses.config import MemoryConfig
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.exchange.mesh import MeshSizes, SequenceMesh
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.interceptors.install_all import install_interceptors
from lightning_ulysses.memory import install
from lightning_ulysses.memory.offload import PlainCopies

P, WIDTH, H, H_KV, D = 2, 256, 8, 4, 32
KINDS: dict[str, dict[str, Any]] = {
    "none": {},
    "block": {"checkpoint": "block"},
    "block+attention": {"checkpoint": "block+attention"},
    "block, offload": {"checkpoint": "block", "offload": "cpu"},
    "block+attention, offload": {"checkpoint": "block+attention", "offload": "cpu"},
}


class Block(nn.Module):
    """A layer of a Llama without positions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attn = nn.ModuleDict({name: nn.Linear(WIDTH, heads * D) for name, heads in (("q", H), ("k", H_KV))})
        self.attn["v"], self.attn["out"] = nn.Linear(WIDTH, H_KV * D), nn.Linear(H * D, WIDTH)
        self.mlp = Mlp(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        # (B, S_r, heads * D) -> (B, heads, S_r, D)
        q, k, v = (self.attn[name](h).unflatten(-1, (-1, D)).transpose(1, 2) for name in "qkv")
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        # (B, H, S_r, D) -> (B, S_r, H * D)
        x = x + self.attn["out"](out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Stack(nn.Module):
    """Blocks, and a loss that needs little memory."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.mean()


class HostBuffers(PlainCopies):
    """Copies to buffers that the meter leaves out."""

    def __init__(self) -> None:
        self.known: list[Tensor] = []

    def buffer(self, size: int) -> Tensor:
        made = super().buffer(size)
        self.known.append(made)
        return made


def measure(rank: int, folder: str, given: argparse.Namespace) -> None:
    """One rank: prints its numbers, of the first rank alone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=P)
    mesh = SequenceMesh.create(MeshSizes(P, 1), "cpu")
    share = given.tokens // P
    x = torch.randn(1, share, WIDTH, requires_grad=True)
    times: dict[str, list[float]] = {name: [] for name in KINDS}
    for turn in range(given.repeats + 1):
        for name, settings in KINDS.items():
            torch.manual_seed(0)
            root, context, buffers = Stack(given.layers), SequenceContext(mesh), HostBuffers()
            with mock.patch("lightning_ulysses.memory.offload.copies_for", lambda device, b=buffers: b):
                handle = install_interceptors(context, root, False)
                handle.add(install(context, root, MemoryConfig(**settings)).remove)
            for parameter in root.parameters():
                # As under ZeRO, gradients leave as soon as they are there.
                parameter.register_post_accumulate_grad_hook(drop)
            step(context, root, x, given.tokens)
            meter = Meter([x, *root.parameters(), *buffers.known]) if turn == 0 else None
            with meter or nullcontext():
                begin = time.process_time()
                kept = step(context, root, x, given.tokens, meter)
                times[name].append(time.process_time() - begin)
            handle.remove()
            if meter is not None and rank == 0:
                host = sum(map(len, buffers.known))
                print(
                    f"{name:26} peak {meter.peak / 2**20:7.1f} MiB   kept for the backward {kept / 2**20:7.1f} MiB   "
                    f"on the host {host / 2**20:6.1f} MiB",
                    flush=True,
                )
    if rank == 0:
        least = {name: min(each[1:]) for name, each in times.items()}
        for name, seconds in least.items():
            print(f"{name:26} processor time {seconds:6.2f} s   {seconds / least['none']:5.2f}x", flush=True)
    dist.destroy_process_group()


def drop(parameter: Tensor) -> None:
    parameter.grad = None


def step(context: SequenceContext, root: nn.Module, x: Tensor, tokens: int, meter: Meter | None = None) -> int:
    """Forward and backward; the bytes that live between them."""
    batch = LocalBatch(SequenceLayout(tokens, P))
    x.grad = None
    dist.barrier()
    with context.step(batch):
        loss = root(x)
    kept = meter.live if meter is not None else 0
    with context.backward(batch):
        loss.backward()
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (folder, given), nprocs=P)


if __name__ == "__main__":
    main()
