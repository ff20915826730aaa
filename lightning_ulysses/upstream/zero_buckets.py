"""Makes ZeRO stages 1 and 2 sum matching gradients on all ranks, in whatever order and number they arrive.

These stages copy gradients into a bucket in the order in which they arrive. Then they sum what is at the same offset on
all ranks (DeepSpeed ``zero/stage_1_and_2.py``, ``reduce_independent_p_g_buckets_and_remove_grads``). Two things differ
between ranks. Slices of different lengths may run different compiled graphs, which return gradients in different
orders. And an expert that no token of a slice chose has no gradient there. Stage 3 sorts by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.agreement import RunningDigest, different_batches, digest, from_all
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.exchange.turns import BackwardTurns

# (parameter group, index in the group)
_Key = tuple[int, int]


def _keys(buckets: Sequence[Any]) -> list[_Key]:
    return sorted((group, place) for bucket in buckets for group, place, _ in bucket.params)


def _sort(optimizer: Any, bucket: Any) -> None:
    """Sorts a bucket by parameter."""
    order = sorted(range(len(bucket.params)), key=lambda index: bucket.params[index][:2])
    if order == list(range(len(order))):
        return
    params, grads = ([held[index] for index in order] for held in (bucket.params, bucket.grads))
    if optimizer.contiguous_gradients:
        # Copies into the buffer may still be running.
        for stream in bucket.copy_streams:
            torch.cuda.current_stream().wait_stream(stream)
        buffer, start = bucket.buffer[bucket.index].narrow(0, 0, bucket.elements), 0
        # Each (...) -> (numbers,)
        buffer.copy_(torch.cat([grad.reshape(-1) for grad in grads]))
        for grad in grads:
            # (numbers,) -> (...)
            grad.data = buffer.narrow(0, start, grad.numel()).view_as(grad)
            start += grad.numel()
        # The reduction runs on a stream of its own. It waits only for what is noted here (`average_tensor`).
        optimizer._record_bucket_producer(bucket)
        if bucket.copy_streams:
            bucket.copy_streams.add(torch.cuda.current_stream())
    bucket.params[:], bucket.grads[:] = params, grads


class GradientQueue:
    """Hands gradients to the buckets only where all ranks do so together, and in the same order.

    A bucket that is full is summed over all ranks. If gradients between two exchanges of attention arrive in another
    order on some rank, its bucket would be full on the other side of an exchange: that rank waits in the exchange for
    one that waits in the sum.

    Args:
        optimizer: DeepSpeed's optimizer.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._take = optimizer.reduce_independent_p_g_buckets_and_remove_grads
        self._waiting: list[tuple[Any, int, Any]] = []
        self._numbers = 0

    def add(self, param: Any, i: int) -> None:
        """Stands for ``reduce_independent_p_g_buckets_and_remove_grads``."""
        # A gradient that is made in parts is complete only later; DeepSpeed leaves it alone until then.
        if not getattr(param, "ds_grad_is_ready", True):
            self._take(param, i)
            return
        # Not more than a bucket waits, so that memory does not grow.
        if self._numbers + param.numel() > self._optimizer.reduce_bucket_size:
            self.drain()
        # Autograd may have made the gradient on another stream than that of the next exchange.
        stream = torch.cuda.current_stream() if param.is_cuda else None
        self._waiting.append((param, i, stream))
        self._numbers += param.numel()

    def drain(self) -> None:
        """Hands over everything that waits."""
        waiting, self._waiting, self._numbers = self._waiting, [], 0
        for param, i, stream in sorted(waiting, key=lambda entry: (entry[1], entry[0].param_idx_in_group)):
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                self._take(param, i)


class GradientAgreement:
    """Replaces ``reduce_ipg_grads`` of an optimizer of stage 1 or 2.

    Args:
        optimizer: DeepSpeed's optimizer.
        module: The user's module, for the names of parameters.
        mesh: Sizes and groups. What is compared travels over the host's group: the host waits for other hosts here, and
            never for its device.
        batches: The hash of the batches so far, which is compared along with the gradients.
    """

    def __init__(self, optimizer: Any, module: nn.Module, mesh: SequenceMesh, batches: RunningDigest) -> None:
        self._optimizer = optimizer
        self._reduce = optimizer.reduce_ipg_grads
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._mesh = mesh
        self._batches = batches
        self.queue = GradientQueue(optimizer)

    def __call__(self, comm_dtype: torch.dtype | None = None) -> None:
        """Sums the gradients in the buckets. A collective, which all ranks call in turn; the last call has no dtype.

        Raises:
            UlyssesError: On every rank, if the ranks' buckets hold different parameters and cannot be completed: more
                gradients follow, or one bucket is too small for all. Also if the ranks of a group had different
                batches.
        """
        if comm_dtype is None:
            # The backward is over.
            self.queue.drain()
        buckets = self._optimizer.ipg_buckets
        chosen = [bucket for dtype, bucket in buckets.items() if comm_dtype in (None, dtype)]
        pending = self._pending(chosen) if comm_dtype is None else []
        if not self._same_everywhere(_keys(chosen), pending) or pending:
            self._complete(chosen, pending, is_last=comm_dtype is None)
        for bucket in chosen:
            _sort(self._optimizer, bucket)
        self._reduce(comm_dtype)

    def _pending(self, buckets: Sequence[Any]) -> list[_Key]:
        """Parameters with a gradient from earlier micro-batches only, which DeepSpeed's hooks alone would drop."""
        optimizer, held = self._optimizer, set(_keys(buckets))
        if optimizer.partition_gradients or not optimizer.is_gradient_accumulation_boundary():
            return []
        return [
            (group, place)
            for group, parameters in enumerate(optimizer.bit16_groups)
            for place, parameter in enumerate(parameters)
            if (group, place) not in held
            and optimizer.get_gradient_for_reduction(parameter) is not None
            and not optimizer.params_already_reduced[optimizer.get_param_id(parameter)]
        ]

    def _same_everywhere(self, keys: list[_Key], pending: list[_Key]) -> bool:
        numbers = [digest(keys, pending), self._batches.number]
        # (2,) -> (W, 2), on the host
        everyone = from_all(torch.tensor(numbers, dtype=torch.int64), self._mesh.host_group)
        for group in everyone[:, 1].split(self._mesh.sp_size):
            if bool((group != group[0]).any()):
                raise different_batches()
        return bool((everyone[:, 0] == everyone[0, 0]).all())

    def _complete(self, buckets: Sequence[Any], pending: list[_Key], is_last: bool) -> None:
        """Adds the pending gradients, and zeros for parameters that have a gradient on other ranks only."""
        optimizer, mine = self._optimizer, set(_keys(buckets))
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (mine | set(pending), self._frozen()), group=self._mesh.host_group)
        everyone, frozen = ([*each] for each in zip(*found, strict=True))
        union = set.union(*everyone)
        if apart := sorted(union & set.union(*frozen)):
            raise self._frozen_on_some(apart)
        numbers = sum(optimizer.bit16_groups[group][place].numel() for group, place in union)
        if not is_last or numbers > optimizer.reduce_bucket_size:
            raise self._too_many(sorted(union - set.intersection(*everyone)))
        for group, place in sorted(union - mine):
            parameter = optimizer.bit16_groups[group][place]
            if optimizer.get_gradient_for_reduction(parameter) is None:
                self._put_zeros(parameter)
            optimizer.reduce_ready_partitions_and_remove_grads(parameter, group)
        self.queue.drain()

    def _frozen(self) -> set[_Key]:
        groups = enumerate(self._optimizer.bit16_groups)
        return {(group, place) for group, held in groups for place, each in enumerate(held) if not each.requires_grad}

    def _put_zeros(self, parameter: nn.Parameter) -> None:
        if self._optimizer.use_grad_accum_attribute:
            held: Any = parameter
            held.grad_accum = torch.zeros_like(parameter, dtype=self._optimizer.gradient_accumulation_dtype)
        else:
            parameter.grad = torch.zeros_like(parameter)

    def _named(self, keys: list[_Key]) -> str:
        groups = self._optimizer.bit16_groups
        names = [self._names.get(id(groups[group][place]), "?") for group, place in keys]
        return f"{', '.join(names[:4])}{', ...' * (len(names) > 4)}"

    def _frozen_on_some(self, keys: list[_Key]) -> UlyssesError:
        return UlyssesError(
            f"gradients of {self._named(keys)} on some ranks, where another one has set requires_grad to False",
            "the same requires_grad on every rank, since the gradients of all slices are added up",
            "freeze parameters by what is the same on every rank, and not by the rank or what its slice holds",
        )

    def _too_many(self, differing: list[_Key]) -> UlyssesError:
        groups = self._optimizer.bit16_groups
        whole = sum(parameter.numel() for group in groups for parameter in group)
        return UlyssesError(
            f"gradients on some ranks only, of {self._named(differing)}, in a step whose "
            f"gradients are added up in parts of {self._optimizer.reduce_bucket_size} numbers",
            "gradients of the same parameters in each part on every rank, or all of them in one part",
            f"set reduce_bucket_size={whole} in the strategy, or use every parameter in each forward",
        )


def agree_on_gradients(
    optimizer: Any, module: nn.Module, mesh: SequenceMesh, batches: RunningDigest, turns: BackwardTurns
) -> None:
    """Installs a `GradientAgreement` for several ranks and stage 1 or 2. It lives as long as the optimizer."""
    if dist.get_world_size() > 1 and hasattr(optimizer, "reduce_ipg_grads"):
        agreement = GradientAgreement(optimizer, module, mesh, batches)
        optimizer.reduce_ipg_grads = functools.wraps(agreement._reduce)(lambda comm_dtype=None: agreement(comm_dtype))
        optimizer.reduce_independent_p_g_buckets_and_remove_grads = agreement.queue.add
        turns.calls.append(agreement.queue.drain)
