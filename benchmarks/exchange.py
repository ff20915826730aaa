"""One attention call on a split sequence: lightning_ulysses against DeepSpeed's ``UlyssesSPAttentionHF``.

Both start from q, k and v as a Hugging Face Llama block hands them over, (B, H, S_r, D) shaped and (B, S_r, H, D) in
memory, and end with a contiguous (B, S_r, H, D). Both run in the same processes, A B B A, each behind a barrier; the
time of a repetition is that of its slowest rank, and the figures are medians of the repetitions' ratios theirs / ours.
Processor time is that of all ranks and threads together: it hardly feels what else the machine is doing.

    python benchmarks/exchange.py            # about six minutes on two cores
    python benchmarks/exchange.py --quick    # about one minute
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import logging
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ready_made import attention_left_out
from torch import Tensor, nn

from lightning_ulysses.attention import MaskSpec, attend
from lightning_ulysses.attention.attend import Softmax
from lightning_ulysses.attention.ulysses import exchanged
from lightning_ulysses.context import LocalBatch
from lightning_ulysses.exchange.mesh import MeshSizes, SequenceMesh
from lightning_ulysses.geometry.layout import SequenceLayout

H, H_KV, D = 32, 8, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Args:
        kind: ``exchange`` (attention itself replaced by ready-made tensors), ``attention``, or ``packed`` (attention
            over eight documents).
        seq_len: S.
        dtype: A key of `DTYPES`.
    """

    kind: str
    seq_len: int
    dtype: str


@dataclass
class Result:
    """Seconds per repetition and how far the two sides are apart; side 0 is ours, side 1 is DeepSpeed's."""

    case: Case
    sp_size: int
    forward: list[list[float]] = field(default_factory=lambda: [[], []])
    backward: list[list[float]] = field(default_factory=lambda: [[], []])
    cpu: list[list[float]] = field(default_factory=lambda: [[], []])
    difference: float = float("nan")
    errors: tuple[float, float] = (float("nan"), float("nan"))


def ratio(sides: list[list[float]]) -> float:
    """Median over repetitions of theirs / ours."""
    return median(theirs / ours for ours, theirs in zip(*sides, strict=True))


def documents_of(seq_len: int) -> tuple[tuple[int, int], ...]:
    """Eight documents of uneven lengths, from half to one and a half of the mean."""
    weights = (8, 5, 12, 7, 10, 4, 11, 7)
    edges = [seq_len * sum(weights[:index]) // sum(weights) for index in range(len(weights) + 1)]
    return tuple(pairwise(edges))


def our_side(mesh: SequenceMesh, case: Case) -> Call:
    """What `lightning_ulysses.interceptors.transformers.attention` does with a call of an attention block."""
    documents = (documents_of(case.seq_len),) if case.kind == "packed" else None
    batch = LocalBatch(SequenceLayout(case.seq_len, mesh.sp_size, documents))
    meaning = Softmax(MaskSpec(causal=True, documents=documents))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return exchanged(batch, q, k, v, meaning, mesh).transpose(1, 2).contiguous()

    return call


def their_side(mesh: SequenceMesh, case: Case) -> Call:
    """``UlyssesSPAttentionHF`` around transformers' SDPA attention, as ``register_with_transformers`` sets it up."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layer = UlyssesSPAttentionHF(
        attn=sdpa_attention_forward,
        batch_size=1,
        attn_head_count=H,
        attn_head_size=D,
        kv_head_count=H_KV,
        num_hidden_layers=1,
        process_group=mesh.sp_group,
        seq_length_is_variable=True,
    )
    block: Any = nn.Module()
    block.num_key_value_groups, block.is_causal = H // H_KV, True
    runs = documents_of(case.seq_len) if case.kind == "packed" else ((0, case.seq_len),)
    positions = torch.cat([torch.arange(end - begin) for begin, end in runs])
    # (S,) -> (1, S_r)
    local = positions.chunk(mesh.sp_size)[mesh.sp_rank].unsqueeze(0)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = layer(block, q, k, v, None, position_ids=local)[0]
        return out.unflatten(2, (H, D))

    return call


def inputs(case: Case, mesh: SequenceMesh) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The whole q, k, v, this rank's slices of them as a Llama block makes them, and the gradient of the output.

    Returns:
        q (1, H, S, D), k and v (1, H_kv, S, D); the same with S_r; (1, S_r, H, D).
    """
    torch.manual_seed(0)
    dtype, span = DTYPES[case.dtype], SequenceLayout(case.seq_len, mesh.sp_size).spans[mesh.sp_rank]
    whole = [torch.randn(1, case.seq_len, heads, D).to(dtype).transpose(1, 2) for heads in (H, H_KV, H_KV)]
    # (1, S_r, heads * D) as a projection returns it -> (1, S_r, heads, D) -> (1, heads, S_r, D)
    local = [t[:, :, span].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in whole]
    return whole, local, torch.randn(1, case.seq_len, H, D).to(dtype)[:, span].contiguous()


def timed(call: Call, tensors: list[Tensor], grad: Tensor) -> tuple[list[float], Tensor, tuple[Tensor, ...]]:
    """Seconds of the forward, of the backward, and of processor time for both; with what they return."""
    dist.barrier()
    used, begin = time.process_time(), time.perf_counter()
    out = call(*tensors)
    forward = time.perf_counter() - begin
    dist.barrier()
    begin = time.perf_counter()
    grads = torch.autograd.grad(out, tensors, grad)
    backward = time.perf_counter() - begin
    return [forward, backward, time.process_time() - used], out.detach(), grads


def relative(got: Tensor, expected: Tensor) -> float:
    """Relative L2 difference over all ranks."""
    sums = torch.stack([(got.double() - expected.double()).square().sum(), expected.double().square().sum()])
    dist.all_reduce(sums)
    return float((sums[0] / sums[1]).sqrt())


def errors_when_packed(whole: list[Tensor], outs: list[Tensor], case: Case, mesh: SequenceMesh) -> tuple[float, float]:
    """Relative error of the two outputs (1, S_r, H, D) against one attention call per document in one process."""
    span = SequenceLayout(case.seq_len, mesh.sp_size).spans[mesh.sp_rank]
    expected = attend(whole[0], whole[1], whole[2], MaskSpec(causal=True, documents=(documents_of(case.seq_len),)))
    expected = expected[:, :, span].transpose(1, 2)
    return relative(outs[0], expected), relative(outs[1], expected)


def measure(case: Case, mesh: SequenceMesh, seconds: float) -> Result:
    """Times one case: a warm-up of both sides, then as many repetitions as ``seconds`` allow, at least three."""
    whole, tensors, grad = inputs(case, mesh)
    sides = [our_side(mesh, case), their_side(mesh, case)]
    result = Result(case, mesh.sp_size)
    begin = time.perf_counter()
    warm = [timed(call, tensors, grad) for call in sides]
    if case.kind != "exchange":
        pairs = [(warm[0][1], warm[1][1]), *zip(warm[0][2], warm[1][2], strict=True)]
        result.difference = max(relative(ours, theirs) for ours, theirs in pairs)
    if case.kind == "packed":
        result.errors = errors_when_packed(whole, [warm[0][1], warm[1][1]], case, mesh)
    repeats = torch.tensor(min(40, max(3, int(seconds / (time.perf_counter() - begin)))))
    dist.broadcast(repeats, 0)
    del warm
    gc.collect()
    for repeat in range(int(repeats)):
        for side in (0, 1) if repeat % 2 == 0 else (1, 0):
            times = torch.tensor(timed(sides[side], tensors, grad)[0], dtype=torch.float64)
            dist.all_reduce(times[:2], dist.ReduceOp.MAX)
            dist.all_reduce(times[2:])
            for kind, value in zip((result.forward, result.backward, result.cpu), times.tolist(), strict=True):
                kind[side].append(value)
    return result


def worker(rank: int, sp_size: int, cases: list[Case], seconds: float, store: str, results: Any) -> None:
    """One process of the group; rank 0 reports."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=sp_size)
    import deepspeed.comm

    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.comm.init_distributed("gloo", verbose=False)
    mesh = SequenceMesh.create(MeshSizes(sp_size=sp_size, dp_size=1), "cpu")
    for case in cases:
        if case.kind == "exchange":
            with attention_left_out():
                result = measure(case, mesh, seconds)
        else:
            result = measure(case, mesh, seconds)
        if rank == 0:
            results.put(result)
    dist.destroy_process_group()


def plan(quick: bool, attention_limit: int) -> list[Case]:
    """The rows to measure, for each number of processes."""
    lengths = [512, 2048] if quick else [512, 1024, 2048, 4096, 8192, 16384]
    packed = [2048] if quick else [2048, 4096]
    kinds = (("exchange", lengths), ("attention", [s for s in lengths if s <= attention_limit]), ("packed", packed))
    return [Case(kind, length, dtype) for kind, chosen in kinds for dtype in DTYPES for length in chosen]


def row(result: Result) -> str:
    """One line of the table."""
    case = result.case
    total = [[f + b for f, b in zip(*side, strict=True)] for side in zip(result.forward, result.backward, strict=True)]
    cells = [result.sp_size, case.dtype, case.seq_len, *(f"{1e3 * median(side):.1f}" for side in total)]
    cells += [f"{ratio(sides):.2f}" for sides in (result.forward, result.backward, total, result.cpu)]
    if case.kind == "attention":
        cells.append(f"{result.difference:.0e}")
    if case.kind == "packed":
        cells += [f"{error:.0e}" for error in result.errors]
    return f"| {' | '.join(map(str, cells))} | {len(total[0])} |"


TITLES = {
    "exchange": "Exchange alone (attention itself left out on both sides)",
    "attention": "The whole attention call",
    "packed": "Eight documents packed into the row",
}
EXTRA = {"exchange": "", "attention": " max. difference |", "packed": " our error | their error |"}


def report(results: list[Result]) -> None:
    """Prints one markdown table per kind."""
    for kind, title in TITLES.items():
        if not any(result.case.kind == kind for result in results):
            continue
        head = "| P | dtype | S | ours, ms | theirs, ms | forward | backward | both | processor time |"
        head += f"{EXTRA[kind]} repetitions |"
        print(f"\n### {title}\n\n{head}\n|{' --- |' * (head.count('|') - 1)}")
        for result in results:
            if result.case.kind == kind:
                print(row(result))


def main() -> None:
    """Runs every case for 2 and 4 processes of one thread each and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two lengths, fewer repetitions")
    parser.add_argument("--sp-sizes", type=int, nargs="+", default=[2, 4], help="numbers of processes")
    parser.add_argument("--seconds", type=float, default=None, help="time per row; 5, or 2 with --quick")
    parser.add_argument("--kinds", nargs="+", default=list(TITLES), choices=list(TITLES))
    parser.add_argument("--attention-limit", type=int, default=4096, help="longest S of the whole attention call")
    args = parser.parse_args()
    seconds = args.seconds or (2.0 if args.quick else 5.0)
    cases = [case for case in plan(args.quick, args.attention_limit) if case.kind in args.kinds]
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"B=1, H={H}, H_kv={H_KV}, D={D}, causal, one thread per process; ratios are theirs / ours", flush=True)
    begin, results = time.perf_counter(), []
    for sp_size in args.sp_sizes:
        with tempfile.TemporaryDirectory() as folder:
            queue = mp.get_context("spawn").SimpleQueue()
            mp.spawn(worker, (sp_size, cases, seconds, os.path.join(folder, "store"), queue), nprocs=sp_size)
            results += [queue.get() for _ in cases]
    report(results)
    print(f"\nThe whole call is measured up to S={args.attention_limit}. Beyond, attention itself takes nearly all of")
    print("the time and is the same kernel on both sides; the table of the exchange goes on to the longest S.")
    print(f"{time.perf_counter() - begin:.0f} s in all.")


if __name__ == "__main__":
    main()
