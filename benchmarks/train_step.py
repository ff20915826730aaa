"""Whole training steps on two processes: ours, and DeepSpeed's ALST recipe.

    python benchmarks/train_step.py [--rounds 3] [--sides ours alst]

All sides train the same Llama by SGD on the same sequences, at ZeRO-2 in float32, with torch's attention. Sides run in
turn, each round in processes of their own. A step is one sequence. Processor time is that of both processes.

Cases: `plain`, causal; `packed`, eight documents in each row, which ALST with torch's attention attends across;
`parts`, plain with checkpointed blocks, MLP and loss on tiles (and norms, ours alone). The Trainer of Hugging Face is
not among them: accelerate 1.15 refuses its sequence parallelism on CPUs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

MARK = "steps: "
TILE = 256
CASES = {"plain": {}, "packed": {"documents": 8}, "parts": {"parts": True}}
BUCKETS = {"allgather_bucket_size": 200_000_000, "reduce_bucket_size": 200_000_000, "overlap_comm": True}


class Clock:
    """Wall and processor seconds at the beginning of each step."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def __call__(self) -> None:
        self.times.append((time.perf_counter(), time.process_time()))


def model(args: argparse.Namespace) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden, "intermediate_size": 3 * args.hidden, "num_hidden_layers": args.layers}
    config = LlamaConfig(
        vocab_size=args.vocab, num_attention_heads=4, num_key_value_heads=2, use_cache=False,
        attn_implementation="sdpa", max_position_embeddings=2**17, **sizes,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def rows(args: argparse.Namespace, case: dict[str, Any]) -> list[dict[str, Any]]:
    import torch

    count = args.steps + args.warm_up + 1
    count += count % 2
    tokens = torch.randint(0, args.vocab, (count, args.seq_len), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(args.seq_len) % (args.seq_len // case.get("documents", 1))
    return [{"input_ids": row, "labels": row.clone(), "position_ids": positions.clone()} for row in tokens]


def ours(args: argparse.Namespace, case: dict[str, Any], clock: Clock) -> None:
    import lightning as L
    import torch
    from torch import Tensor
    from torch.utils.data import DataLoader

    from lightning_ulysses import UlyssesDeepSpeedStrategy

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model(args)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            clock()

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    memory = {"tiled_loss": True, "tiled_mlp": True, "tiled_norm": True, "tile_tokens": TILE, "checkpoint": args.keep}
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    strategy = UlyssesDeepSpeedStrategy(sp_size=2, stage=2, memory=memory if case.get("parts") else None)
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, **quiet)
    trainer.fit(Module(), DataLoader(rows(args, case), batch_size=1))  # type: ignore[arg-type]


@contextmanager
def tiled_mlp() -> Iterator[None]:
    """DeepSpeed's recipe for the MLP of a Llama."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.LlamaMLP.forward

    def forward(self: Any, x: Any) -> Any:
        weights = [self.down_proj.weight, self.gate_proj.weight, self.up_proj.weight]
        return TiledMLP.apply(plain, self, x, math.ceil(x.shape[1] / TILE), weights)

    modeling_llama.LlamaMLP.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        modeling_llama.LlamaMLP.forward = plain  # type: ignore[method-assign]


def alst_loss(net: Any, batch: dict[str, Any], group: Any, is_tiled: bool) -> Any:
    """The mean over all targets of the sequence, as DeepSpeed's tutorial computes it."""
    import torch
    import torch.distributed.nn.functional as joined
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    labels = batch.pop("shift_labels")
    targets = (labels != -100).sum()
    if is_tiled:
        hidden = net.model(**batch).last_hidden_state

        def total(self: Any, x: Any, y: Any) -> Any:
            return torch.nn.functional.cross_entropy(self(x).float(), y, reduction="sum")

        shards = math.ceil(hidden.shape[1] / TILE)
        weights = [net.lm_head.weight]
        # Its backward multiplies what tiles gave hidden states alone, so the mean is taken before.
        loss = TiledFusedLogitsLoss.apply(
            lambda self, x, y: total(self, x, y) / targets, net.lm_head, hidden, labels, None, shards, weights, "sum"
        )
    else:
        logits = net(**batch).logits
        loss = net.loss_function(logits=logits, labels=None, shift_labels=labels, vocab_size=net.config.vocab_size)
    losses, counts = joined.all_gather(loss, group=group), joined.all_gather(targets, group=group)
    return sum(each * count for each, count in zip(losses, counts, strict=True)) / sum(counts)


def alst(args: argparse.Namespace, case: dict[str, Any], clock: Clock) -> None:
    import deepspeed
    import torch
    import torch.distributed as dist
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF, UlyssesSPDataLoaderAdapter
    from torch.utils.data import DataLoader
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from lightning_ulysses.upstream.deepspeed import without_shared_memory_op

    if not dist.is_initialized():
        # A stale build lock of the operator would be waited for.
        with without_shared_memory_op():
            deepspeed.init_distributed("gloo")
    net, before = model(args), ALL_ATTENTION_FUNCTIONS["sdpa"]
    if case.get("parts"):
        net.gradient_checkpointing_enable({"use_reentrant": False})
    mpu = UlyssesSPAttentionHF.register_with_transformers(net, "sdpa", 2, 1, seq_length_is_variable=True)
    zero = {"stage": 2, "contiguous_gradients": True, **BUCKETS}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    config |= {"gradient_clipping": 0.0, "steps_per_print": 10**9}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config, mpu=mpu)
    group, rank = mpu.get_sequence_parallel_group(), mpu.get_sequence_parallel_rank()
    own = DataLoader(rows(args, case)[rank::2], batch_size=1)  # type: ignore[arg-type]
    loader = UlyssesSPDataLoaderAdapter(own, rank, group, 2, torch.device("cpu"))
    try:
        # Also in the backward, where checkpointed blocks run again.
        with tiled_mlp() if case.get("parts") else nullcontext():
            for batch in loader:
                clock()
                engine.backward(engine_loss(engine, batch, group, bool(case.get("parts"))))
                engine.step()
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = before
        engine.destroy()
        forget_groups()


def forget_groups() -> None:
    """DeepSpeed makes its sequence group once for a process, and refuses to make it again."""
    import deepspeed.runtime.sequence_parallel.parallel_state_sp as state

    for name in [name for name in vars(state) if name.startswith("_") and name.isupper()]:
        setattr(state, name, None)


def engine_loss(engine: Any, batch: dict[str, Any], group: Any, is_tiled: bool) -> Any:
    if not is_tiled:
        # The loss of logits that come through the engine's own call.
        labels = batch["shift_labels"]
        inputs = {name: value for name, value in batch.items() if name != "shift_labels"}
        logits = engine(**inputs).logits
        return alst_loss(_Given(engine.module, logits), {"shift_labels": labels}, group, False)
    return alst_loss(engine.module, batch, group, True)


class _Given:
    """A model whose logits were computed."""

    def __init__(self, net: Any, logits: Any) -> None:
        self.config, self.loss_function, self.logits = net.config, net.loss_function, logits

    def __call__(self) -> Any:
        return self


SIDES: dict[str, Callable[[argparse.Namespace, dict[str, Any], Clock], None]] = {
    "ours": ours, "alst": alst,
}  # fmt: skip


def run(side: str, args: argparse.Namespace) -> None:
    """All cases of one side in this process; prints its steps."""
    import torch

    torch.set_num_threads(1)
    for name in args.cases:
        clock = Clock()
        length = args.packed_len if name == "packed" else args.seq_len
        SIDES[side](argparse.Namespace(**{**vars(args), "seq_len": length}), CASES[name], clock)
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(clock.times[args.warm_up :])]
        print(MARK + json.dumps([name, steps[: args.steps]]), flush=True)


def measure(side: str, arguments: list[str]) -> dict[str, tuple[float, float]]:
    """Median wall seconds of a step, and processor seconds of both processes, for each case."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, str(Path(__file__).resolve()), "--run", side, *arguments]
    here = str(Path(__file__).resolve().parents[1])
    running = []
    for rank in ("0", "1"):
        environment = {
            **os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": here, "TORCHELASTIC_RUN_ID": "none",
            "GROUP_RANK": "0",
        }  # fmt: skip
        running.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    found: dict[str, list[list[tuple[float, float]]]] = {}
    for process in running:
        out, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"{side} failed:\n{errors[-3000:]}")
        for line in out.splitlines():
            if line.startswith(MARK):
                name, steps = json.loads(line.removeprefix(MARK))
                found.setdefault(name, []).append(steps)
    return {
        name: (
            median(wall for wall, _ in ranks[0]),
            median(a[1] + b[1] for a, b in zip(*ranks, strict=True)),
        )
        for name, ranks in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--sides", nargs="+", default=["ours", "alst"], choices=list(SIDES))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--packed-len", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=1000)
    parser.add_argument("--keep", default="block+attention", choices=["block", "block+attention"])
    args = parser.parse_args()
    if args.run:
        run(args.run, args)
        return
    names = ("steps", "warm_up", "seq_len", "packed_len", "hidden", "layers", "vocab", "keep")
    arguments = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    arguments += ["--cases", *args.cases]
    print("| case | round | side | wall, ms | processor, ms | its wall / ours | its processor time / ours |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    ratios: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for number in range(args.rounds):
        order = args.sides if number % 2 == 0 else args.sides[::-1]
        found = {side: measure(side, arguments) for side in order}
        for case in args.cases:
            own = found.get("ours", next(iter(found.values())))[case]
            for side in args.sides:
                wall, processor = found[side][case]
                ratio = wall / own[0], processor / own[1]
                ratios.setdefault((case, side), []).append(ratio)
                times = f"{1e3 * wall:.0f} | {1e3 * processor:.0f} | {ratio[0]:.3f} | {ratio[1]:.3f}"
                print(f"| {case} | {number + 1} | {side} | {times} |", flush=True)
    for (case, side), each in ratios.items():
        walls, processors = zip(*each, strict=True)
        print(f"| {case} | median | {side} | | | {median(walls):.3f} | {median(processors):.3f} |")


if __name__ == "__main__":
    main()
