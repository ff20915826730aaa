"""Random streams that are seeded by a name, independent of earlier draws."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch


def _gpus(device: torch.device | None) -> list[torch.device]:
    return [device] if device is not None and device.type == "cuda" else []


@contextmanager
def kept_streams(device: torch.device | None = None) -> Iterator[None]:
    """Restores the random states of torch, Python and NumPy at the end.

    Args:
        device: If it is a GPU, its random state is restored as well.
    """
    # Looked up, not imported: the program may not have loaded NumPy.
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
    """Draws inside come from a stream of their own in torch, Python and NumPy. Afterwards, all states are restored.

    Args:
        *name: The name of the stream. Processes that pass the same name draw the same numbers.
        device: If it is a GPU, it is seeded as well.
    """
    # 4 bytes: NumPy takes no larger seed.
    seed = int.from_bytes(hashlib.blake2s(repr(name).encode(), digest_size=4).digest(), "little")
    with kept_streams(device):
        # Not torch.manual_seed, which would seed all GPUs; `fork_rng` restores only this one.
        torch.default_generator.manual_seed(seed)
        for gpu in _gpus(device):
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed)
        yield


def step_stream(seed: int, dp_rank: int, batch: int, epoch: int = 0) -> AbstractContextManager[None]:
    """The random numbers of a training step on the CPU, for a process without the strategy.

    Args:
        seed: The run's.
        dp_rank: Of the data-parallel group whose batch it is.
        batch: Number of training batches that the group has used, over all epochs.
        epoch: Number of epochs finished.
    """
    return named_stream(seed, dp_rank, "train", "training_step", epoch, batch)
