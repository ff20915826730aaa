"""The way of one steady training batch through the package: how often it moves from one file to another.

A step of a small Llama on two processes, ZeRO-2. Every call of a function of the package counts; a move is a call into
another file than the last one. Prints the files in the order in which they are first entered, and both totals.

    python benchmarks/trace.py
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_ulysses
from lightning_ulysses import UlyssesDeepSpeedStrategy

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
PACKAGE = str(Path(lightning_ulysses.__file__).parent) + os.sep
STEADY = 6


class Tracer(L.Callback):
    """Notes the files of all calls between the ends of two batches."""

    def __init__(self) -> None:
        self.files: list[str] = []

    def _call(self, frame: FrameType, event: str, argument: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(PACKAGE) and frame.f_code.co_name != "<genexpr>":
            self.files.append(name[len(PACKAGE) :])

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == STEADY:
            sys.setprofile(self._call)
        elif batch_idx == STEADY + 1:
            sys.setprofile(None)


class Llama(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        self.model: Any = LlamaForCausalLM(
            LlamaConfig(vocab_size=61, num_attention_heads=4, num_key_value_heads=2, **sizes)
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trace(rank: int) -> list[str]:
    tracer = Tracer()
    tokens = torch.randint(0, 61, (STEADY + 3, 33), generator=torch.Generator().manual_seed(0))
    loader: Any = DataLoader([{"input_ids": row, "labels": row} for row in tokens], batch_size=1)  # type: ignore
    strategy = UlyssesDeepSpeedStrategy(sp_size=2)
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, callbacks=[tracer], **QUIET)
    trainer.fit(Llama(), loader)
    return tracer.files


def main() -> None:
    try:
        from lightning_ulysses.testing import ProcessPool
    except ImportError:
        from lightning_ulysses.processes import ProcessPool  # type: ignore[no-redef]
    with ProcessPool(2) as pool:
        files = pool.run(trace, world_size=2)[0]
    moves = sum(left != right for left, right in pairwise(files))
    calls = Counter(files)
    print("| file | calls |\n| --- | --- |")
    for name in dict.fromkeys(files):
        print(f"| `{name}` | {calls[name]} |")
    print(f"\n{len(files)} calls, {moves} moves between {len(calls)} files")


if __name__ == "__main__":
    main()
