"""Carries weights that hooks and callbacks edited into the copy that ZeRO steps from.

ZeRO steps from a copy of each rank's part of the weights, and then overwrites the module's weights with it (DeepSpeed
``zero/stage_1_and_2.py``, ``zero/stage3.py``, ``bf16_optimizer.py``). What anybody but the optimizer has written into
the weights would last until the next step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Numbers that are compared at once.
_CHUNK = 2**24


class MasterCopy:
    """The copy of an optimizer of DeepSpeed.

    Args:
        optimizer: DeepSpeed's optimizer; of an engine that only evaluates, which has no copy, nothing is carried.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        stages: Any = ("bit16_groups", "bf16_groups")
        names = [name for name in stages if hasattr(optimizer, f"{name}_flat")]
        self._flat = list(getattr(optimizer, f"{names[0]}_flat")) if names else []
        groups = zip(getattr(optimizer, names[0]), self._flat, strict=True) if names else ()
        # Where each parameter is in the flat tensor of its group.
        self._places = [
            (parameter, flat, parameter.storage_offset() - flat.storage_offset())
            for parameters, flat in groups
            for parameter in parameters
        ]

    def carry_edits(self) -> None:
        """Copies this rank's part of edited weights into the optimizer's copy; no collective.

        A weight was edited if it is no longer the optimizer's one in the precision of the module. Weights that nobody
        edited keep the digits that this precision does not hold.
        """
        with torch.no_grad():
            self._settle_replaced()
            _settle_persistent(self._optimizer)
            for live, master in _parts(self._optimizer):
                # Swapped out to a disk, or one and the same tensor.
                if live.numel() != master.numel() or live.data_ptr() == master.data_ptr():
                    continue
                # Each (numbers,)
                for mine, kept in zip(live.detach().split(_CHUNK), master.detach().split(_CHUNK), strict=True):
                    there = mine.to(kept.device)
                    kept.copy_(torch.where(there == kept.to(there.dtype), kept, there.to(kept.dtype)))

    def _settle_replaced(self) -> None:
        """Copies tensors that were set as ``.data`` of a parameter to where ZeRO expects it."""
        for parameter, flat, place in self._places:
            home = flat.detach().narrow(0, place, parameter.numel())
            if parameter.data_ptr() != home.data_ptr():
                # (numbers,) -> (...)
                parameter.data = home.view_as(parameter).copy_(parameter)


def _parts(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of the weights, and the optimizer's copy of it, for each group of parameters."""
    if hasattr(optimizer, "fp16_partitioned_groups_flat"):
        for live, master in zip(
            optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
        ):
            if live is not None:
                yield live, master
        return
    names = ("parallel_partitioned_bit16_groups", "single_partition_of_fp32_groups")
    if hasattr(optimizer, "bf16_partitioned_groups"):
        names = ("bf16_partitioned_groups", "fp32_groups_flat_partition")
    # An engine that only evaluates.
    if not hasattr(optimizer, names[0]):
        return
    groups = zip(getattr(optimizer, names[0]), getattr(optimizer, names[1]), strict=True)
    for (parts, master), group in zip(groups, optimizer.real_dp_process_group, strict=True):
        yield parts[dist.get_rank(group)], master


def _settle_persistent(optimizer: Any) -> None:
    """Copies small parameters, which ZeRO-3 leaves whole on each rank, into this rank's part of them."""
    for parameter in getattr(optimizer, "persistent_parameters", ()):
        if parameter.numel() != parameter.ds_numel:
            continue
        part, rank = parameter.ds_tensor, dist.get_rank(parameter.ds_process_group)
        # (...) -> (numbers,)
        mine = parameter.detach().flatten()[part.ds_numel * rank : part.ds_numel * (rank + 1)]
        part.narrow(0, 0, mine.numel()).copy_(mine)
