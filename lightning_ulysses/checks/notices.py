"""What a run says of itself, each thing once: how it is split, and that a step was skipped."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from lightning_ulysses.exchange.agreement import from_all
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.loss.weights import StepWeights


class Notices:
    """Says it on rank 0.

    Args:
        mesh: Sizes and groups.
        stage: Of ZeRO; 0 without it.
        weights: Hold the loss of the last step.
        device: The device of collectives.
        say: Prints a line, on rank 0 only.
    """

    def __init__(
        self, mesh: SequenceMesh, stage: int, weights: StepWeights, device: torch.device, say: Callable[[str], None]
    ) -> None:
        self._mesh = mesh
        self._stage = stage
        self._weights = weights
        self._device = device
        self._say = say
        self._is_started = False
        self._is_skip_told = False

    def started(self, split: str) -> None:
        """Says how the training is split.

        Args:
            split: ``"batch"`` or ``"blocks"``, see `UlyssesDeepSpeedStrategy`.
        """
        if self._is_started:
            return
        self._is_started = True
        groups = f"{self._mesh.dp_size} data-parallel group{'s' * (self._mesh.dp_size > 1)}"
        where = "in the batch" if split == "batch" else "inside the model"
        how = f"each sequence is split over P={self._mesh.sp_size} processes, {where}"
        if self._mesh.sp_size == 1:
            how = "sp_size=1, so sequences stay whole"
        self._say(f"Ulysses: {how}; {groups}, ZeRO stage {self._stage} over {self._mesh.world_size} processes.")

    def skipped(self, step: int) -> None:
        """Warns of a step that DeepSpeed skipped; a collective, since all ranks skip a step together.

        Args:
            step: Its number, counted from 1.
        """
        if self._is_skip_told:
            return
        self._is_skip_told = True
        is_finite = torch.isfinite(self._weights.own_loss).reshape(1).to(self._device, torch.int32)
        # (W, 1) -> (W,)
        finite = from_all(is_finite, None).flatten().tolist()
        if self._mesh.rank:
            return
        ranks = [rank for rank, good in enumerate(finite) if not good]
        what = f"the loss on ranks {ranks}" if ranks else "a gradient, whose loss is finite on all ranks,"
        warnings.warn(
            f"Optimizer step {step} was skipped: {what} is infinite or NaN. In float16 the scale of the loss is "
            "lowered until it fits, and the first steps may be skipped; anywhere else, look at the batch and the "
            "learning rate. Later ones are counted in trainer.strategy.deepspeed_engine.skipped_steps.",
            stacklevel=2,
        )
