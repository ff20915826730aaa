"""Random numbers that depend on a name instead of on what has been drawn before."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _gpus(device: torch.device | None) -> list[torch.device]:
    return [device] if device is not None and device.type == "cuda" else []


@contextmanager
def kept_streams(device: torch.device | None = None) -> Iterator[None]:
    """Puts the streams of torch, Python and NumPy back to where they were before.

    Args:
        device: The GPU whose stream counts as well, if any.
    """
    numpy: Any = sys.modules.get("numpy")
    of_python, of_numpy = random.getstate(), numpy.random.get_state() if numpy is not None else None
    with torch.random.fork_rng(_gpus(device), device_type="cuda"):
        try:
            yield
        finally:
            random.setstate(of_python)
            if numpy is not None:
                numpy.random.set_state(of_numpy)


@contextmanager
def named_stream(*name: object, device: torch.device | None = None) -> Iterator[None]:
    """Draws from a stream of its own in torch, Python and NumPy, and leaves the process's streams alone.

    Args:
        *name: Tells streams apart; processes that pass the same name draw the same.
        device: The GPU whose stream counts as well, if any.
    """
    seed = int.from_bytes(hashlib.blake2s(repr(name).encode(), digest_size=4).digest(), "little")
    with kept_streams(device):
        torch.default_generator.manual_seed(seed)
        for gpu in _gpus(device):
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed)
        yield
