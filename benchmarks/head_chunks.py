"""Time and peak bytes of one attention call in chunks of heads, against all heads at once, on gloo processes.

    python benchmarks/head_chunks.py [--seq-len 4096] [--sp-size 2] [--repeats 5]

All variants run in the same processes in turns, each behind a barrier. A time is that of the slowest rank, the least of
the repetitions. Peaks count the storages that live at a time beside q, k, v and the gradient of the output, on rank 0.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from memory_parts import Meter
from torch import Tensor

from lightning_ulysses.attention import MaskSpec
from lightning_ulysses.attention.attend import Softmax
from lightning_ulysses.attention.chunked import HeadChunks, exchanged_by_chunks
from lightning_ulysses.attention.ulysses import exchanged
from lightning_ulysses.context import LocalBatch
from lightning_ulysses.exchange.mesh import MeshSizes, SequenceMesh
from lightning_ulysses.geometry.layout import SequenceLayout

H, H_KV, D = 32, 8, 64
VARIANTS = [HeadChunks(1), HeadChunks(2), HeadChunks(4), HeadChunks("auto"), HeadChunks("auto", overlaps=True)]


def call(inputs: list[Tensor], grad: Tensor, seq_len: int, mesh: SequenceMesh, chunks: HeadChunks) -> None:
    """Forward and backward."""
    batch, meaning = LocalBatch(SequenceLayout(seq_len, mesh.sp_size)), Softmax(MaskSpec(causal=True))
    if chunks.count == 1:
        out = exchanged(batch, *inputs, meaning, mesh)
    else:
        out = exchanged_by_chunks(batch, *inputs, meaning, mesh, chunks)
    torch.autograd.grad(out, inputs, grad)


def worker(rank: int, sp_size: int, seq_len: int, repeats: int, store: str) -> None:
    """One process of the group; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=sp_size)
    mesh = SequenceMesh.create(MeshSizes(sp_size=sp_size, dp_size=1), "cpu")
    share = SequenceLayout(seq_len, sp_size).shares[rank]
    inputs = [torch.randn(1, share, h, D).transpose(1, 2).requires_grad_() for h in (H, H_KV, H_KV)]
    grad = torch.randn(1, share, H, D).transpose(1, 2)
    peaks, times = [], [float("inf")] * len(VARIANTS)
    for chunks in VARIANTS:
        with Meter([*inputs, grad]) as meter:
            call(inputs, grad, seq_len, mesh, chunks)
        peaks.append(meter.peak)
    for _ in range(repeats):
        for number, chunks in enumerate(VARIANTS):
            dist.barrier()
            begin = time.perf_counter()
            call(inputs, grad, seq_len, mesh, chunks)
            slowest = torch.tensor(time.perf_counter() - begin)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            times[number] = min(times[number], float(slowest))
    if rank == 0:
        print("| chunks | time, ms | | peak, MiB | |\n| --- | --- | --- | --- | --- |")
        for chunks, seconds, peak in zip(VARIANTS, times, peaks, strict=True):
            name = f"{chunks.of(H, sp_size)}{', overlap' if chunks.overlaps else ''}"
            cells = (
                f"{1e3 * seconds:.0f}",
                f"{seconds / times[0]:.2f}",
                f"{peak / 2**20:.1f}",
                f"{peak / peaks[0]:.2f}",
            )
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--sp-size", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"P={given.sp_size}, S={given.seq_len}, B=1, H={H}, H_kv={H_KV}, D={D}, float32, causal", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (given.sp_size, given.seq_len, given.repeats, os.path.join(folder, "store"))
        mp.spawn(worker, arguments, nprocs=given.sp_size)


if __name__ == "__main__":
    main()
