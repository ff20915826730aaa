"""Seconds that the trial of the first step takes on two processes, beside a forward and backward on its excerpt.

    python benchmarks/trial.py                            # a Llama of 24 layers, hidden 1024
    python benchmarks/trial.py --layers 4 --hidden 256

Prints for each rank the wall and processor time of the trial, and those of one forward and backward of the same module
on as many tokens as the trial takes.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

# Tokens of an excerpt for two processes.
TOKENS = 48


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Wall and processor seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--split", choices=("batch", "blocks"), default="batch")
    args = parser.parse_args()

    import lightning as L
    import torch
    from torch import Tensor
    from torch.utils.data import DataLoader
    from transformers import LlamaConfig, LlamaForCausalLM

    from lightning_ulysses import UlyssesDeepSpeedStrategy
    from lightning_ulysses.sequence_parallel import SequenceParallel

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            sizes = {"hidden_size": args.hidden, "intermediate_size": 3 * args.hidden, "num_hidden_layers": args.layers}
            config = LlamaConfig(vocab_size=1000, num_attention_heads=8, num_key_value_heads=2, **sizes)
            self.model: Any = LlamaForCausalLM(config)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    torch.set_num_threads(1)
    tokens = torch.randint(0, 1000, (1, args.seq_len), generator=torch.Generator().manual_seed(0))
    excerpt = {"input_ids": tokens[:, :TOKENS], "labels": tokens[:, :TOKENS]}
    module = Module()
    plain = [timed(lambda: module.training_step(excerpt, 0).backward()) for _ in range(4)][1:]
    module.zero_grad(set_to_none=True)
    try_step = SequenceParallel.try_step

    def watched(self: SequenceParallel, *given: Any) -> Any:
        output: list[Any] = []
        wall, cpu = timed(lambda: output.append(try_step(self, *given)))
        step_wall, step_cpu = min(plain)
        print(
            f"rank {self.mesh.rank}: trial {wall:.2f} s, {cpu:.2f} s of the processor; forward and backward "
            f"{step_wall:.2f} s, {step_cpu:.2f} s; ratio {cpu / step_cpu:.1f}",
            flush=True,
        )
        return output[0]

    SequenceParallel.try_step = watched  # type: ignore[method-assign]
    loader: Any = DataLoader([{"input_ids": tokens[0], "labels": tokens[0]}], batch_size=1)  # type: ignore[arg-type]
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    strategy = UlyssesDeepSpeedStrategy(sp_size=2, split=args.split)
    L.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, **quiet).fit(module, loader)


if __name__ == "__main__":
    main()
