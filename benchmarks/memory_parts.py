"""Processor time and peak bytes of a loss and of an MLP, tile by tile against as they are, in one run on the CPU.

    python benchmarks/memory_parts.py [--tokens 4096] [--repeats 5]

Peaks count the storages that live at a time beside parameters and inputs, in forward and backward. torch's own
`linear_cross_entropy`, where torch has it, gets the rows that have a target.
"""

from __future__ import annotations

import argparse
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_ulysses.config import MemoryConfig
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.exchange.mesh import ALONE
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.memory import install


class Meter(TorchDispatchMode):
    """Counts the bytes of storages that live, and the most there were."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def _drop(self, key: int, size: int) -> None:
        self.live -= size
        self._seen.discard(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(answer):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                if storage._cdata not in self._seen:
                    self._seen.add(storage._cdata)
                    size = storage.nbytes()
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._drop, storage._cdata, size)
        return answer


class Mlp(nn.Module):
    """The MLP of a Llama."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def measure(step: Callable[[], None], root: nn.Module, known: list[Tensor], repeats: int) -> tuple[float, int]:
    """Seconds, the least of several, and peak bytes."""
    step()
    root.zero_grad()
    with Meter([*known, *root.parameters()]) as meter:
        step()
    times = []
    for _ in range(repeats):
        root.zero_grad()
        begin = time.process_time()
        step()
        times.append(time.process_time() - begin)
    return min(times), meter.peak


def compare(name: str, root: nn.Module, step: Callable[[], None], known: list[Tensor], **settings: Any) -> None:
    repeats = settings.pop("repeats")
    plain = measure(step, root, known, repeats)
    context = SequenceContext(ALONE)
    handle = install(context, root, MemoryConfig(**settings))
    with context.step(LocalBatch(SequenceLayout(8, 1))):
        tiled = measure(step, root, known, repeats)
    handle.remove()
    print(
        f"{name:32} time {tiled[0] / plain[0]:5.2f}x ({plain[0] * 1e3:7.1f} -> {tiled[0] * 1e3:7.1f} ms)   "
        f"peak {tiled[1] / plain[1]:5.2f}x ({plain[1] / 2**20:7.1f} -> {tiled[1] / 2**20:6.1f} MiB)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokens, width, vocab = given.tokens, 256, 8192
    x = torch.randn(1, tokens, width, requires_grad=True)
    labels = torch.randint(0, vocab, (tokens,))
    head = nn.ModuleDict({"head": nn.Linear(width, vocab, bias=False)})
    for masked in (0.0, 0.9):
        target = labels.masked_fill(torch.rand(tokens) < masked, -100)

        def loss(target: Tensor = target) -> None:
            F.cross_entropy(head["head"](x).view(-1, vocab).float(), target).backward()

        settings = {"tiled_loss": ["head"], "tile_tokens": 256, "repeats": given.repeats}
        compare(f"loss, {masked:.0%} masked", head, loss, [x, target], **settings)
        if hasattr(F, "linear_cross_entropy"):
            options = nn.LinearCrossEntropyOptions()

            def fused(target: Tensor = target, options: Any = options) -> None:
                kept = (target != -100).nonzero().squeeze(-1)
                rows, weight = x.view(-1, width)[kept], head["head"].weight
                F.linear_cross_entropy(rows, weight, target[kept], options=options).backward()

            seconds, peak = measure(fused, head, [x, target], given.repeats)
            print(f"{'':7} torch's linear_cross_entropy  {seconds * 1e3:7.1f} ms, {peak / 2**20:6.1f} MiB", flush=True)
    mlp = nn.ModuleDict({"mlp": Mlp(width, 4 * width)})

    def through() -> None:
        mlp["mlp"](x).sum().backward()

    compare("MLP", mlp, through, [x], tiled_mlp=True, tile_tokens=256, repeats=given.repeats)


if __name__ == "__main__":
    main()
