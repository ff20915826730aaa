"""Tokens per second of a training step on one long sequence: two processes against one, of one thread each.

Beside the ratio stands its ceiling: two independent one-process runs at the same time, over one alone. What the cores
cannot do side by side (shared caches, memory, clock, other work), no split of the sequence can do either.
The three kinds of run take turns.

    python benchmarks/scaling.py             # about five minutes on two cores
    python benchmarks/scaling.py --quick     # S=4096, about one minute
    python benchmarks/scaling.py --quick --model Qwen3Next
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

HIDDEN, LAYERS, VOCABULARY = 128, 2, 1024
GROUPED = {"intermediate_size": 4 * HIDDEN, "num_attention_heads": 4, "num_key_value_heads": 2}
# Hybrids have one layer with a scan, and one with attention.
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {**GROUPED, "max_position_embeddings": 2**20},
    "Qwen3Next": {
        **GROUPED,
        "head_dim": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_only_layers": [0, 1],
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    },
    "Bamba": {**GROUPED, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 32},
}


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        seconds: Median seconds per optimizer step.
        processor: Median seconds of processor time per optimizer step, all processes together.
    """

    seconds: float
    processor: float


def train(model: str, sp_size: int, seq_len: int, steps: int, folder: str) -> None:
    """Trains ``steps`` optimizer steps in ``sp_size`` processes; each writes its step times into ``folder``."""
    import lightning as L
    import torch
    import transformers

    from lightning_ulysses import UlyssesDeepSpeedStrategy

    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    L.seed_everything(0)
    config = getattr(transformers, f"{model}Config")(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        use_cache=False,
        pad_token_id=0,
        **MODELS[model],
    )
    kind = getattr(transformers, f"{model}ForCausalLM")
    config._attn_implementation = "sdpa" if kind._supports_sdpa else "eager"

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = kind(config)

        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    class Clock(L.Callback):
        def __init__(self) -> None:
            self.marks: list[tuple[float, float]] = []

        def on_train_batch_end(self, *_: Any) -> None:
            self.marks.append((time.perf_counter(), time.process_time()))

    tokens = torch.randint(VOCABULARY, (steps + 1, seq_len))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    clock = Clock()
    trainer = L.Trainer(
        strategy=UlyssesDeepSpeedStrategy(sp_size=sp_size, stage=2),
        accelerator="cpu",
        devices=sp_size,
        callbacks=[clock],
        max_steps=steps + 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader: Any = torch.utils.data.DataLoader(rows, batch_size=1)  # type: ignore[arg-type]
    trainer.fit(Module(), loader)
    # The first step is the warm-up.
    Path(folder, f"{trainer.global_rank}.json").write_text(json.dumps(clock.marks))


def start(model: str, sp_size: int, seq_len: int, steps: int, folder: str) -> subprocess.Popen[bytes]:
    """Starts `train` in processes of its own, of one thread each."""
    options = ["--model", model, "--child", str(sp_size), "--seq-len", str(seq_len)]
    options += ["--steps", str(steps), "--folder", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, os.path.abspath(__file__), *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def collect(process: subprocess.Popen[bytes], folder: str) -> Run:
    """Waits for a run and reads its times."""
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors.decode()[-2000:])
    ranks = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    seconds = [later[0] - sooner[0] for sooner, later in zip(ranks[0][:-1], ranks[0][1:], strict=True)]
    processor = [sum(rank[step + 1][1] - rank[step][1] for rank in ranks) for step in range(len(seconds))]
    return Run(median(seconds), median(processor))


def together(model: str, sp_sizes: list[int], seq_len: int, steps: int) -> list[Run]:
    """Runs side by side, one for each of ``sp_sizes``."""
    with tempfile.TemporaryDirectory() as root:
        folders = [os.path.join(root, str(index)) for index in range(len(sp_sizes))]
        for folder in folders:
            os.mkdir(folder)
        started = [start(model, size, seq_len, steps, folder) for size, folder in zip(sp_sizes, folders, strict=True)]
        try:
            return [collect(process, folder) for process, folder in zip(started, folders, strict=True)]
        finally:
            for process in started:
                process.terminate()


def measure(model: str, seq_len: int, steps: int) -> list[float]:
    """One round: a line of the table."""
    (one,) = together(model, [1], seq_len, steps)
    (two,) = together(model, [2], seq_len, steps)
    pair = together(model, [1, 1], seq_len, steps)
    ratio = one.seconds / two.seconds
    ceiling = sum(one.seconds / run.seconds for run in pair)
    speeds = [seq_len / one.seconds, seq_len / two.seconds]
    return [*speeds, ratio, ceiling, ratio / ceiling, 2 * one.processor / two.processor]


def row(name: str, values: list[float]) -> str:
    """One line of the table."""
    return f"| {name} | {values[0]:.0f} | {values[1]:.0f} | {' | '.join(f'{value:.2f}' for value in values[2:])} |"


def main() -> None:
    """Takes turns: one process, two processes on one sequence, two independent runs of one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="S=4096 and two rounds")
    parser.add_argument("--seq-len", type=int, default=None, help="S; 16384, or 4096 with --quick")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps per run, behind one to warm up")
    parser.add_argument("--rounds", type=int, default=None, help="3, or 2 with --quick")
    parser.add_argument("--model", choices=MODELS, default="Llama")
    parser.add_argument("--child", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    seq_len = args.seq_len or (4096 if args.quick else 16384)
    if args.child is not None:
        train(args.model, args.child, seq_len, args.steps, args.folder)
        return
    print(
        f"{args.model}, {LAYERS} layers, hidden {HIDDEN}, B=1, S={seq_len}, fp32, ZeRO-2, AdamW; {MODELS[args.model]}\n"
    )
    print("| round | 1 process, tokens/s | 2 processes, tokens/s | ratio | ceiling | of ceiling | by processor time |")
    print(f"|{' --- |' * 7}", flush=True)
    begin, rounds = time.perf_counter(), []
    for number in range(args.rounds or (2 if args.quick else 3)):
        rounds.append(measure(args.model, seq_len, args.steps))
        print(row(str(number + 1), rounds[-1]), flush=True)
    print(row("median", [median(column) for column in zip(*rounds, strict=True)]))
    print("\nratio: tokens/s of 2 processes over 1. ceiling: two independent runs side by side over one alone. By")
    print("processor time: the ratio if every process had a core to itself and never waited for the other.")
    print(f"{time.perf_counter() - begin:.0f} s in all.")


if __name__ == "__main__":
    main()
