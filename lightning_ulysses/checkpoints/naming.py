"""The name of a run and what a manifest says of it, for every strategy that saves checkpoints."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from lightning_ulysses.checkpoints.load import Found
from lightning_ulysses.checkpoints.manifest import Division, Manifest
from lightning_ulysses.upstream import shards


class RunName:
    """Names a run, which keeps its name when it is resumed. That of rank 0 counts."""

    def __init__(self) -> None:
        self._name = uuid.uuid4().hex

    def goes_on(self, found: Found) -> None:
        """Takes the name of the run that saved a checkpoint, if that is known."""
        self._name = found.run or self._name

    def manifest(self, step: int, sp_size: int, zero_optimizer: Any, division: Division) -> Manifest:
        """What a checkpoint of this run says of itself.

        Args:
            step: Optimizer steps taken.
            sp_size: P.
            zero_optimizer: DeepSpeed's, which holds the user's.
            division: How the state is divided.
        """
        optimizer = type(getattr(zero_optimizer, "optimizer", None)).__name__
        return Manifest(self._name, step, sp_size, optimizer, division)


def division(world_size: int, config: Mapping[str, Any]) -> Division:
    """How a run with a DeepSpeed config divides its state."""
    return Division(world_size, *shards.divided_by(config))
