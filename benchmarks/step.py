"""Seconds of a training step on two processes, against another checkout of this package.

Both sides train the same module on the same batches, in runs that take turns: a Llama of transformers, and a model and
loss written by hand. The first steps, in which a module is tried, are left out.

    git worktree add /tmp/before 0a8f005
    python benchmarks/step.py --against /tmp/before          # about ten minutes
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

MARK = "seconds of steps: "


def module(kind: str, args: argparse.Namespace) -> Any:
    """A LightningModule that notes when each step begins."""
    import lightning as L
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    class Timed(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.times: list[float] = []

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.times.append(time.process_time() if args.processor else time.perf_counter())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class Llama(Timed):
        def __init__(self) -> None:
            super().__init__()
            from transformers import LlamaConfig, LlamaForCausalLM

            sizes = {"hidden_size": args.hidden, "intermediate_size": 3 * args.hidden, "num_hidden_layers": args.layers}
            config = LlamaConfig(vocab_size=1000, num_attention_heads=4, num_key_value_heads=2, **sizes)
            self.model: Any = LlamaForCausalLM(config)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self.model(**batch).loss

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.qkv = nn.LayerNorm(args.hidden), nn.Linear(args.hidden, 3 * args.hidden)
            self.out = nn.Linear(args.hidden, args.hidden)

        def forward(self, x: Tensor) -> Tensor:
            # (B, S, 3 * H * D) -> (B, S, 3, H, D) -> three of (B, H, S, D)
            q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            # (B, H, S, D) -> (B, S, H * D)
            return x + self.out(heads.transpose(1, 2).flatten(2))

    class ByHand(Timed):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(1000, args.hidden)
            self.layers = nn.ModuleList([Block() for _ in range(args.layers)])
            self.head = nn.Linear(args.hidden, 1000)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            x = self.embed(batch["input_ids"])
            for layer in self.layers:
                x = layer(x)
            return F.cross_entropy(self.head(x).flatten(0, 1), batch["shift_labels"].flatten())

    return {"transformers": Llama, "by hand": ByHand}[kind]()


def run(kind: str, args: argparse.Namespace) -> None:
    """One fit; prints the seconds of its steps."""
    import lightning as L
    import torch
    from torch.utils.data import DataLoader

    from lightning_ulysses import UlyssesDeepSpeedStrategy

    torch.set_num_threads(1)
    count = args.steps + args.warm_up + 1
    tokens = torch.randint(0, 1000, (count, args.seq_len), generator=torch.Generator().manual_seed(0))
    loader: Any = DataLoader([{"input_ids": row, "labels": row} for row in tokens], batch_size=1)  # type: ignore
    timed = module(kind, args)
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    strategy = UlyssesDeepSpeedStrategy(sp_size=2)
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, **quiet)
    trainer.fit(timed, loader)
    if trainer.is_global_zero:
        times = timed.times[args.warm_up :]
        print(MARK + json.dumps([b - a for a, b in pairwise(times)]), flush=True)


def seconds(checkout: Path, kind: str, arguments: list[str]) -> float:
    """The median step of one fit with the package of a checkout."""
    command = [sys.executable, str(Path(__file__).resolve()), "--run", kind, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    line = next(line for line in output.splitlines() if line.startswith(MARK))
    return median(json.loads(line.removeprefix(MARK)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="the other checkout")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=6, help="runs of each side")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--processor", action="store_true", help="processor time, for a machine that others use too")
    args = parser.parse_args()
    if args.run:
        run(args.run, args)
        return
    if args.against is None:
        parser.error("--against DIR is missing: a checkout of another commit")
    names = ("steps", "warm_up", "seq_len", "hidden", "layers")
    arguments = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    arguments += ["--processor"] * args.processor
    here = Path(__file__).resolve().parents[1]
    print(f"Two processes, S={args.seq_len}, hidden {args.hidden}, {args.layers} layers; medians of {args.steps} steps")
    print("\n| module | round | other, ms | this, ms | ratio |\n| --- | --- | --- | --- | --- |")
    for kind in ("transformers", "by hand"):
        ratios = []
        for number in range(args.rounds):
            sides = [args.against, here] if number % 2 == 0 else [here, args.against]
            found = {side: seconds(side, kind, arguments) for side in sides}
            ratios.append(found[here] / found[args.against])
            times = f"{1e3 * found[args.against]:.1f} | {1e3 * found[here]:.1f}"
            print(f"| {kind} | {number + 1} | {times} | {ratios[-1]:.3f} |", flush=True)
        print(f"| {kind} | median | | | {median(ratios):.3f} |", flush=True)


if __name__ == "__main__":
    main()
