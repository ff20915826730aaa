"""What the strategy costs where nothing is split, and what the interceptors cost where nothing is live.

1. ``sp_size=1`` against Lightning's own ``DeepSpeedStrategy``, in one process of one thread each: the same Llama, ZeRO
   stage, batches and Trainer, in runs that take turns. Lightning's refuses CPUs: the benchmark takes that check out, as
   ours does.
2. Intercepted functions, called on tiny tensors outside of a step, with the interceptor and without it.

    python benchmarks/overhead.py            # about three minutes
    python benchmarks/overhead.py --rounds 2 --steps 10
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies.ddp import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ulysses import UlyssesDeepSpeedStrategy
from lightning_ulysses.context import SequenceContext
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.interceptors.install_all import install_interceptors
from lightning_ulysses.testing import QUIET
from lightning_ulysses.testing.processes import ProcessPool
from lightning_ulysses.upstream.deepspeed import without_shared_memory_op


class PlainDeepSpeed(DeepSpeedStrategy):
    """Lightning's strategy without its refusal of CPUs."""

    def setup_environment(self) -> None:
        self.parallel_devices = [torch.device("cpu", index) for index in range(len(self.parallel_devices or []))]
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        with without_shared_memory_op():
            super().setup_distributed()


class Llama(L.LightningModule):
    """Notes when each step begins."""

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
        self.model: Any = LlamaForCausalLM(
            LlamaConfig(vocab_size=1000, num_attention_heads=4, num_key_value_heads=2, **sizes)
        )
        self.times: list[tuple[float, float]] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.times.append((time.perf_counter(), time.process_time()))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def steps_of(strategy: Any, args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds of each step, by the clock and of processor time; the first ones are left out."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 1000, (args.steps + args.warm_up + 1, args.seq_len), generator=generator)
    loader: Any = DataLoader([{"input_ids": row, "labels": row} for row in tokens], batch_size=1)  # type: ignore
    module = Llama(args.hidden, args.layers)
    L.Trainer(accelerator="cpu", devices=1, strategy=strategy, max_epochs=1, **QUIET).fit(module, loader)
    pairs = list(zip(module.times[args.warm_up :], module.times[args.warm_up + 1 :], strict=False))
    return [b[0] - a[0] for a, b in pairs], [b[1] - a[1] for a, b in pairs]


def strategies(rank: int, args: argparse.Namespace) -> list[list[tuple[list[float], list[float]]]]:
    """For each round the steps of Lightning's strategy and of ours."""
    torch.set_num_threads(1)
    rounds = []
    for number in range(args.rounds):
        sides: list[Callable[[], Any]] = [
            lambda: PlainDeepSpeed(stage=args.stage),
            lambda: UlyssesDeepSpeedStrategy(sp_size=1, stage=args.stage),
        ]
        order = (0, 1) if number % 2 == 0 else (1, 0)
        with contextlib.redirect_stdout(io.StringIO()):
            measured = {side: steps_of(sides[side](), args) for side in order}
        rounds.append([measured[0], measured[1]])
    return rounds


def calls() -> dict[str, Callable[[], Any]]:
    """Calls of everything that is intercepted and runs on CPU, each of which looks its function up anew."""
    from transformers.modeling_utils import AttentionInterface

    q = torch.zeros(1, 1, 1, 8)
    logits, target = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    attention = torch.nn.MultiheadAttention(8, 1, batch_first=True).eval()
    block: Any = torch.nn.Module()
    registry: Any = AttentionInterface._global_mapping
    return {
        "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(q, q, q),
        "cross_entropy": lambda: F.cross_entropy(logits, target),
        "nn.MultiheadAttention": lambda: attention(q[0], q[0], q[0]),
        "transformers' sdpa": lambda: registry["sdpa"](block, q, q, q, None),
    }


def microseconds(call: Callable[[], Any], repeats: int = 5000) -> float:
    """The least of a few means."""
    best = float("inf")
    for _ in range(7):
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        best = min(best, (time.perf_counter() - begin) / repeats)
    return 1e6 * best


def interceptors() -> None:
    """Prints what a call costs with and without the interceptor."""
    import transformers.modeling_utils  # noqa: F401  (its functions are replaced where it has been imported)

    mesh = SequenceMesh(rank=0, world_size=2, sp_size=2, sp_rank=0, dp_size=1, dp_rank=0)
    print("\n| call outside of a step | without, µs | with, µs | difference, µs |\n| --- | --- | --- | --- |")
    with torch.no_grad():
        for name, call in calls().items():
            found: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(5):
                found[False].append(microseconds(call))
                handle = install_interceptors(SequenceContext(mesh), torch.nn.Module(), zero_stage_3=False)
                found[True].append(microseconds(call))
                handle.remove()
            without, with_it = min(found[False]), min(found[True])
            print(f"| `{name}` | {without:.2f} | {with_it:.2f} | {with_it - without:+.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="runs of each side")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--stage", type=int, default=2)
    args = parser.parse_args()
    with ProcessPool(1, timeout=1800) as pool:
        rounds = pool.run(strategies, args, world_size=1)[0]
    print(f"One process, S={args.seq_len}, hidden {args.hidden}, {args.layers} layers, ZeRO-{args.stage}; medians")
    print("\n| round | Lightning's, ms | ours, ms | ratio | ratio by processor time |\n| --- | --- | --- | --- | --- |")
    ratios: list[tuple[float, float]] = []
    for number, (plain, ours) in enumerate(rounds, 1):
        ratios.append((median(ours[0]) / median(plain[0]), median(ours[1]) / median(plain[1])))
        times = f"{1e3 * median(plain[0]):.1f} | {1e3 * median(ours[0]):.1f}"
        print(f"| {number} | {times} | {ratios[-1][0]:.3f} | {ratios[-1][1]:.3f} |")
    wall, processor = (median(column) for column in zip(*ratios, strict=True))
    print(f"| median | | | {wall:.3f} | {processor:.3f} |")
    interceptors()


if __name__ == "__main__":
    main()
