"""Bytes, collectives and time of the exchange of one layer with a scan, against an all-to-all for each tensor.

    python benchmarks/mixers.py [--seq-len 4096] [--sp-size 2] [--repeats 5]

A layer is a causal convolution and a scan, of the sizes of a known model, forward and backward. The scan itself is left
out on both sides. The separate way sends each tensor by itself, the channels of the convolution there and back among
them. Bytes are those that a rank sends to others. Both ways run in the same processes in turns, each behind a barrier.
A time is that of the slowest rank, the least of the repetitions, and so is the processor time of a rank.
Steps of whole models: benchmarks/scaling.py --model.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.exchange.all_to_all import heads_to_seq
from lightning_ulysses.exchange.bundle import bundle_to_heads
from lightning_ulysses.exchange.mesh import MeshSizes, SequenceMesh
from lightning_ulysses.geometry.heads import head_layout
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.mixing.call import MixerCall
from lightning_ulysses.mixing.exchange import exchanged
from lightning_ulysses.mixing.table import TABLE

WIDTH = 4


@dataclass(frozen=True)
class Layer:
    """Shapes of the inputs of a scan, S_r for the sequence; gates are float32, the others bfloat16."""

    function: str
    channels: int
    shapes: dict[str, tuple[Any, ...]]
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)


LAYERS = {
    "Qwen3-Next, gated delta rule": Layer(
        "chunk_gated_delta_rule",
        2 * 16 * 128 + 32 * 128,
        {"q": (16, 128), "k": (16, 128), "v": (32, 128), "g": (32,), "beta": (32,)},
    ),
    "Nemotron-H 8B, Mamba2": Layer(
        "mamba_chunk_scan_combined",
        128 * 64 + 2 * 8 * 128,
        {"x": (128, 64), "dt": (128,), "B": (8, 128), "C": (8, 128)},
        {"A": (128,)},
    ),
    "Jamba, Mamba": Layer(
        "selective_scan_fn",
        8192,
        {"u": (8192, "S"), "delta": (8192, "S"), "B": (16, "S"), "C": (16, "S"), "z": (8192, "S")},
        {"A": (8192, 16)},
    ),
}


@dataclass
class Sent:
    """What this rank sent to others."""

    bytes: int = 0
    collectives: int = 0


@contextmanager
def counted() -> Iterator[Sent]:
    """Counts all-to-alls."""
    sent, original, rank = Sent(), dist.all_to_all_single, dist.get_rank()

    def count(output: Tensor, given: Tensor, out_sizes: Any, sizes: Any, **kwargs: Any) -> Any:
        sent.collectives += 1
        sent.bytes += (sum(sizes) - sizes[rank]) * given.element_size()
        return original(output, given, out_sizes, sizes, **kwargs)

    with mock.patch.object(dist, "all_to_all_single", count):
        yield sent


def scan(*args: Any, **kwargs: Any) -> Any:
    """Stands for the scan: all inputs have gradients, and nothing is computed with them."""
    # The one with the shape of the output: v of linear attention, and x or u of a state space.
    out: Tensor = args[0] if args[0].dim() == 3 or args[1].dim() == 3 else args[2]
    rest = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value is not out]
    return out + sum(value.sum().to(out.dtype) for value in rest)


def conv(x: Tensor, weight: Tensor) -> Tensor:
    """Stands for the convolution."""
    return x


def made(layer: Layer, share: int) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of the scan and of the convolution."""
    inputs = {}
    for name, shape in layer.shapes.items():
        is_last = shape[-1] == "S"
        sizes = (1, *shape[:-1], share) if is_last else (1, share, *shape)
        dtype = torch.float32 if name in ("g", "dt") else torch.bfloat16
        inputs[name] = torch.randn(sizes).to(dtype).requires_grad_()
    return inputs, torch.randn(1, share, layer.channels).to(torch.bfloat16).mT.requires_grad_()


def fused(layer: Layer, batch: LocalBatch, context: SequenceContext, inputs: dict[str, Tensor], x: Tensor) -> None:
    """As this package does it."""
    weight = torch.ones(layer.channels, WIDTH, dtype=x.dtype)
    convolution = MixerCall("causal_conv1d_fn", TABLE["causal_conv1d_fn"], conv, (x, weight), {})
    parameters = {name: torch.ones(shape) for name, shape in layer.parameters.items()}
    first = [operand.names[0] for operand in TABLE[layer.function].operands[: TABLE[layer.function].by_position]]
    call = MixerCall(layer.function, TABLE[layer.function], scan, tuple({**inputs, **parameters}[n] for n in first), {
        name: value for name, value in inputs.items() if name not in first
    })  # fmt: skip
    with context.step(batch):
        total = exchanged(convolution, batch, context).sum() + exchanged(call, batch, context).sum()
    torch.autograd.grad(total, [*inputs.values(), x], allow_unused=True)


def separate(layer: Layer, batch: LocalBatch, context: SequenceContext, inputs: dict[str, Tensor], x: Tensor) -> None:
    """An all-to-all for each tensor, and two for the convolution."""
    mesh, shares = context.mesh, batch.layout.shares
    assert mesh.sp_group is not None
    call = MixerCall(layer.function, TABLE[layer.function], scan, (), inputs)
    like = call.operands[call.mixer.like]
    total = torch.zeros(())
    for name, part in [("", x.unsqueeze(3)), *call.operands.items()]:
        heads = part.shape[1] if not name else like.shape[1]
        layout = head_layout(heads, part.shape[1], mesh.sp_size, True)
        ranges = [layout.query_ranges if not name or "h" in call.dims[name] else layout.kv_ranges]
        (whole,) = bundle_to_heads([part], ranges, shares, mesh.sp_rank, mesh.sp_group)
        if not name or name == call.mixer.like:
            whole = heads_to_seq(whole, layout, shares, mesh.sp_rank, mesh.sp_group)
        total = total + whole.sum()
    torch.autograd.grad(total, [*inputs.values(), x])


WAYS: dict[str, Callable[..., None]] = {"fused": fused, "separate": separate}


def worker(rank: int, sp_size: int, seq_len: int, repeats: int, store: str) -> None:
    """One process of the group; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=sp_size)
    context = SequenceContext(SequenceMesh.create(MeshSizes(sp_size=sp_size, dp_size=1), "cpu"))
    batch = LocalBatch(SequenceLayout(seq_len, sp_size))
    if rank == 0:
        print("| layer | way | collectives | MiB sent | ms | | processor time, ms | |")
        print(f"|{' --- |' * 8}", flush=True)
    for name, layer in LAYERS.items():
        inputs, x = made(layer, batch.layout.shares[rank])
        sent, times, worked = {}, dict.fromkeys(WAYS, float("inf")), dict.fromkeys(WAYS, float("inf"))
        for way, run in WAYS.items():
            with counted() as sent[way]:
                run(layer, batch, context, inputs, x)
        for _ in range(repeats):
            for way, run in WAYS.items():
                dist.barrier()
                begin, busy = time.perf_counter(), time.process_time()
                run(layer, batch, context, inputs, x)
                slowest = torch.tensor([time.perf_counter() - begin, time.process_time() - busy])
                dist.all_reduce(slowest, dist.ReduceOp.MAX)
                times[way] = min(times[way], float(slowest[0]))
                worked[way] = min(worked[way], float(slowest[1]))
        for way in WAYS:
            cells = f"{sent[way].collectives} | {sent[way].bytes / 2**20:.1f}"
            pairs = ((1e3 * each[way], each[way] / each["fused"]) for each in (times, worked))
            if rank == 0:
                spent = " | ".join(f"{milliseconds:.0f} | {ratio:.2f}" for milliseconds, ratio in pairs)
                print(f"| {name} | {way} | {cells} | {spent} |", flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Starts the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--sp-size", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"P={given.sp_size}, S={given.seq_len}, B=1, bfloat16 with gates in float32, k={WIDTH}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (given.sp_size, given.seq_len, given.repeats, os.path.join(folder, "store"))
        mp.spawn(worker, arguments, nprocs=given.sp_size)


if __name__ == "__main__":
    main()
