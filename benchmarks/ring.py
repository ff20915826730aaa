"""Ulysses against gathered keys and ring attention on the same causal attention call: numbers received, and time.

By formula for any P, and on gloo: what each rank receives is counted, and the time of a repetition is that of its
slowest rank. The ways take turns in the same processes. Ring attention is the one below: slices in pairs of parts
(zigzag), so that all ranks do the same, as gathered keys do after their swap; its sequence lies in that order already.

    python benchmarks/ring.py            # some minutes on two cores
    python benchmarks/ring.py --formula  # at once
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_ulysses.attention import MaskSpec, attend
from lightning_ulysses.attention.attend import Softmax
from lightning_ulysses.attention.ulysses import exchanged
from lightning_ulysses.context import LocalBatch
from lightning_ulysses.exchange.mesh import MeshSizes, SequenceMesh
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.geometry.query_runs import query_runs

D = 64
Call = Callable[[Tensor, Tensor, Tensor], Tensor]
_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def received(heads: int, kv_heads: int, ranks: int, ulysses: int, causal: bool = True) -> float:
    """Numbers that the rank with the most receives in a forward, in units of S * D.

    Args:
        heads: H, a multiple of ``ulysses``.
        kv_heads: H_kv.
        ranks: P.
        ulysses: U; 0 stands for ring attention.
        causal: Whether ranks swap queries.
    """
    if not ulysses:
        return 2 * kv_heads * (ranks - 1) / ranks
    gather = ranks // ulysses
    inner = (ulysses - 1) / ulysses / gather
    # Queries and outputs: the exchange, and the swap of half or all of them.
    moved = 0.0 if gather == 1 or not causal else 0.5 if gather == 2 else 1.0
    queries = 2 * heads / ulysses * (inner + moved / gather)
    return queries + 2 * max(1.0, kv_heads / ulysses) * (inner + (gather - 1) / gather)


class _Ring(torch.autograd.Function):
    """Ring attention over slices of two parts, rank r with parts r and 2 P - 1 - r."""

    @staticmethod
    def _blocks(rank: int, source: int, half: int) -> tuple[slice, slice, bool]:
        """Queries and keys that see each other, of this rank and of ``source``, and whether causally."""
        if source == rank:
            return slice(None), slice(None), True
        return (slice(None), slice(half), False) if source < rank else (slice(half, None), slice(None), False)

    @staticmethod
    def _pass_on(tensors: list[Tensor], rank: int, ranks: int) -> list[Tensor]:
        """Sends tensors to the next rank and returns those of the one before."""
        incoming = [torch.empty_like(tensor) for tensor in tensors]
        operations = [dist.P2POp(dist.isend, tensor, (rank + 1) % ranks) for tensor in tensors]
        operations += [dist.P2POp(dist.irecv, tensor, (rank - 1) % ranks) for tensor in incoming]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        return incoming

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rank, ranks, half = dist.get_rank(), dist.get_world_size(), q.shape[2] // 2
        times = q.shape[1] // k.shape[1]
        out, total = torch.zeros_like(q), torch.full(q.shape[:3], float("-inf"))
        held = [k.contiguous(), v.contiguous()]
        for step in range(ranks):
            rows, columns, causal = _Ring._blocks(rank, (rank - step) % ranks, half)
            keys, values = (t[:, :, columns].repeat_interleave(times, dim=1) for t in held)
            part, sums = _kernel(q[:, :, rows], keys, values, is_causal=causal)
            before = total[:, :, rows]
            after = torch.logaddexp(before, sums.view_as(before))
            old = out[:, :, rows] * (before - after).exp().unsqueeze(-1)
            out[:, :, rows] = old + part * (sums.view_as(before) - after).exp().unsqueeze(-1)
            total[:, :, rows] = after
            if step + 1 < ranks:
                held = _Ring._pass_on(held, rank, ranks)
        ctx.save_for_backward(q, k, v, out, total)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, total = ctx.saved_tensors
        rank, ranks, half, grad = dist.get_rank(), dist.get_world_size(), q.shape[2] // 2, grads[0].contiguous()
        times = q.shape[1] // k.shape[1]
        d_q = torch.zeros_like(q)
        held = [k.contiguous(), v.contiguous(), torch.zeros_like(k), torch.zeros_like(v)]
        for step in range(ranks):
            rows, columns, causal = _Ring._blocks(rank, (rank - step) % ranks, half)
            keys, values = (t[:, :, columns].repeat_interleave(times, dim=1) for t in held[:2])
            # With the sums over all keys, the backward of each block is its part of the whole.
            parts = _kernel_backward(
                grad[:, :, rows], q[:, :, rows], keys, values, out[:, :, rows], total[:, :, rows], 0.0, causal
            )
            d_q[:, :, rows] += parts[0]
            for sums, part in zip(held[2:], parts[1:], strict=True):
                # (B, H, S_k, D) -> (B, H_kv, H / H_kv, S_k, D) -> (B, H_kv, S_k, D)
                sums[:, :, columns] += part.unflatten(1, (-1, times)).sum(dim=2)
            if step + 1 < ranks:
                held = _Ring._pass_on(held, rank, ranks)
        return d_q, *(_Ring._pass_on(held[2:], rank, ranks) if ranks > 1 else held[2:])


@dataclass(frozen=True)
class Case:
    """One row: P, H, H_kv and S."""

    ranks: int
    heads: int
    kv_heads: int
    seq_len: int

    @property
    def ways(self) -> list[int]:
        """Numbers U of ranks that exchange heads; 0 for ring attention."""
        return [size for size in (1, 2, 4) if self.ranks % size == 0 and size <= min(self.ranks, self.heads)] + [0]


def name(way: int, ranks: int) -> str:
    if not way:
        return "ring"
    return "Ulysses" if way == ranks else "gathered" if way == 1 else f"{way} x {ranks // way}"


@contextmanager
def counting(counts: list[int]) -> Iterator[None]:
    """Adds the bytes that this rank receives from others."""
    swap, pass_on = dist.all_to_all_single, _Ring._pass_on
    # torch 2.13 has renamed it.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def all_to_all(recv: Tensor, send: Tensor, recv_sizes: Any = None, send_sizes: Any = None, **more: Any) -> Any:
        own = dist.get_rank(more.get("group"))
        counts[0] += (sum(recv_sizes) - recv_sizes[own]) * recv.element_size()
        return swap(recv, send, recv_sizes, send_sizes, **more)

    def all_gather(recv: Tensor, send: Tensor, **more: Any) -> Any:
        counts[0] += (recv.numel() - send.numel()) * recv.element_size()
        return gather(recv, send, **more)

    def ring(tensors: list[Tensor], rank: int, ranks: int) -> list[Tensor]:
        counts[0] += sum(tensor.nbytes for tensor in tensors)
        return pass_on(tensors, rank, ranks)

    with (
        mock.patch.object(dist, "all_to_all_single", all_to_all),
        mock.patch.object(dist, "all_gather_single", all_gather, create=True),
        mock.patch.object(dist, "all_gather_into_tensor", all_gather),
        mock.patch.object(_Ring, "_pass_on", staticmethod(ring)),
    ):
        yield


def places(case: Case, way: int, rank: int) -> Tensor:
    """The tokens of a rank's slice."""
    if way:
        span = SequenceLayout(case.seq_len, case.ranks).spans[rank]
        return torch.arange(span.start, span.stop)
    runs = query_runs((case.seq_len // case.ranks,) * case.ranks, True).of(rank)
    return torch.cat([torch.arange(*run) for run in runs])


def call_of(case: Case, way: int, rank: int) -> Call:
    if not way:
        return _Ring.apply
    mesh = SequenceMesh(rank, case.ranks, case.ranks, rank, 1, 0, sp_group=dist.group.WORLD, ulysses=way)
    batch, meaning = LocalBatch(SequenceLayout(case.seq_len, case.ranks)), Softmax(MaskSpec(causal=True))
    return lambda q, k, v: exchanged(batch, q, k, v, meaning, mesh)


def measure(case: Case, rank: int, repeats: int) -> list[tuple[str, float, float, float, float]]:
    """For each way its name, seconds, processor seconds, gigabytes received, and the largest relative error."""
    torch.manual_seed(0)
    whole = [torch.randn(1, heads, case.seq_len, D) for heads in (case.heads, case.kv_heads, case.kv_heads)]
    weights = torch.randn(1, case.heads, case.seq_len, D)
    leaves = [tensor.clone().requires_grad_() for tensor in whole]
    wanted = attend(*leaves, MaskSpec(causal=True))
    expected = [wanted.detach(), *torch.autograd.grad((wanted * weights).sum(), leaves)]
    found: dict[int, list[Tensor]] = {}
    errors: dict[int, float] = {}
    volumes = {way: [0] for way in case.ways}
    calls = {way: call_of(case, way, rank) for way in case.ways}
    for repeat in range(repeats + 1):
        for way in case.ways if repeat % 2 else case.ways[::-1]:
            at = places(case, way, rank)
            local = [tensor[:, :, at].clone().requires_grad_() for tensor in whole]
            grad = weights[:, :, at].contiguous()
            dist.barrier()
            used, begin = time.process_time(), time.perf_counter()
            with counting(volumes[way] if repeat == 0 else [0]):
                out = calls[way](*local)
                grads = torch.autograd.grad(out, local, grad)
            times = torch.tensor([time.perf_counter() - begin, time.process_time() - used], dtype=torch.float64)
            dist.all_reduce(times[:1], dist.ReduceOp.MAX)
            dist.all_reduce(times[1:])
            if repeat:
                found.setdefault(way, []).append(times)
                continue
            pairs = zip([out.detach(), *grads], expected, strict=True)
            errors[way] = max(float((got - want[:, :, at]).norm() / want[:, :, at].norm()) for got, want in pairs)
    rows = []
    for way, times in found.items():
        both = torch.tensor([volumes[way][0] / (4 * case.seq_len * D), errors[way]], dtype=torch.float64)
        dist.all_reduce(both, dist.ReduceOp.MAX)
        seconds, processor = (median(float(each[column]) for each in times) for column in (0, 1))
        rows.append((name(way, case.ranks), seconds, processor, float(both[0]), float(both[1])))
    return sorted(rows, key=lambda row: ("Ulysses", "2", "gathered", "ring").index(row[0].split(" ")[0]))


def worker(rank: int, ranks: int, cases: list[Case], repeats: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    # Makes the groups that exchanges of some of the heads need.
    SequenceMesh.create(MeshSizes(ranks, 1), "cpu")
    for case in cases:
        rows = measure(case, rank, repeats)
        if rank == 0:
            results.put((case, rows))
    dist.destroy_process_group()


def formulas() -> None:
    """What each way receives in a forward, in S * D numbers."""
    print("| P | H | H_kv | Ulysses | 8 x P / 8 | gathered | gathered, not causal | ring |\n|" + " --- |" * 8)
    for ranks in (8, 16, 32, 64):
        for heads, kv_heads in ((32, 32), (32, 8), (32, 1)):
            cells = [f"{received(heads, kv_heads, ranks, ranks):.2f}" if ranks <= heads else "-"]
            cells.append(f"{received(heads, kv_heads, ranks, 8):.2f}")
            cells += [f"{received(heads, kv_heads, ranks, 1, causal):.2f}" for causal in (True, False)]
            cells.append(f"{received(heads, kv_heads, ranks, 0):.2f}")
            print(f"| {ranks} | {heads} | {kv_heads} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formula", action="store_true", help="no measurement")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    formulas()
    if args.formula:
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"\nB=1, S={args.seq_len}, D={D}, causal, fp32; forward and backward, the rank with the most\n")
    print("| P | H | H_kv | way | ms | processor ms | received, S * D | error |\n|" + " --- |" * 8)
    for ranks in args.ranks:
        heads = [(8, 8), (8, 2), (8, 1), (2, 2), (1, 1)]
        cases = [Case(ranks, *each, args.seq_len) for each in heads]
        with tempfile.TemporaryDirectory() as folder:
            queue = mp.get_context("spawn").SimpleQueue()
            store = os.path.join(folder, "store")
            mp.spawn(worker, (ranks, cases, args.repeats, store, queue), nprocs=ranks)
            for case, rows in (queue.get() for _ in cases):
                for way, seconds, processor, volume, error in rows:
                    cells = f"{way} | {1e3 * seconds:.0f} | {1e3 * processor:.0f} | {volume:.2f} | {error:.0e}"
                    print(f"| {ranks} | {case.heads} | {case.kv_heads} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
