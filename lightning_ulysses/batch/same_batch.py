"""Checks that all ranks of a group hold the same batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_ulysses.batch.recognition import entries_of
from lightning_ulysses.batch.whole import WholeBatch
from lightning_ulysses.exchange.agreement import RunningDigest, different_batches, digest, fingerprint, from_all
from lightning_ulysses.exchange.mesh import SequenceMesh

# The first batches of each stage are compared by themselves, and later ones by what was added up to them.
_FIRST, _EVERY = 3, 10
# Elements of a large tensor, such as an image, that count.
_MOST = 2**20


def _digest(batch: Any) -> int:
    """A hash of all tensors and numbers of a batch, cut or not."""
    leaves = tree_leaves(entries_of(batch))
    numbers = [leaf for leaf in leaves if isinstance(leaf, (int, float))]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    shapes = [tuple(tensor.shape) for tensor in tensors]
    return fingerprint(tensors, _MOST) ^ digest(numbers, shapes)


class SameBatches:
    """Compares batches over the ranks of a group.

    In training at ZeRO stages 1 and 2, `running` is compared in each step as well, by a collective that is there
    anyway; see `upstream.zero_buckets`.

    Args:
        mesh: Sizes and groups.
        device: The device for collectives.

    Attributes:
        running: The hash of all batches so far.
    """

    def __init__(self, mesh: SequenceMesh, device: torch.device) -> None:
        self._mesh = mesh
        self._device = device
        self._kind, self._count = "", 0
        self.running = RunningDigest()

    def check(self, whole: WholeBatch, kind: str, everywhere: bool) -> None:
        """Takes note of a batch; for the first ones of each stage and for some later ones a collective.

        Args:
            whole: This rank's batch.
            kind: Of its step.
            everywhere: Whether the exchange spans the world. Then all ranks raise together, and no group waits for one
                that stopped. This requires equally many batches on all data-parallel ranks.

        Raises:
            UlyssesError: On every rank of the group, or of the world with ``everywhere``, if a group holds different
                batches.
        """
        if self._mesh.sp_group is None:
            return
        self._count = self._count + 1 if kind == self._kind else 1
        self._kind = kind
        self.running.add(_digest(whole.template))
        if self._count > _FIRST and self._count % _EVERY:
            return
        # The length is for the message; the hash compares all values.
        numbers = [whole.layout.seq_len, self.running.number]
        mine = torch.tensor(numbers, dtype=torch.int64)
        # A group of one sequence has no group of its own on the host.
        on_host = self._mesh.host_group, mine
        group, mine = on_host if everywhere else (self._mesh.sp_group, mine.to(self._device))
        # (ranks, 2), read from the device at once
        received = from_all(mine, group).cpu()
        for group in received.split(self._mesh.sp_size):
            if not bool((group == group[0]).all()):
                raise different_batches(f" (sequence lengths {group[:, 0].tolist()})")
