"""Random numbers that depend on a name instead of on what has been drawn before."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.seed import isolate_rng


@contextmanager
def named_stream(*name: object, device: torch.device | None = None) -> Iterator[None]:
    """Draws from a stream of its own in torch, Python and NumPy, and leaves the process's streams alone.

    Args:
        *name: What tells streams apart; processes that pass the same draw the same.
        device: The GPU whose stream counts as well, if any.
    """
    seed = int.from_bytes(hashlib.blake2s(repr(name).encode(), digest_size=4).digest(), "little")
    gpus = [device] if device is not None and device.type == "cuda" else []
    with isolate_rng(include_cuda=False), torch.random.fork_rng(gpus, device_type="cuda"):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed)
        yield
