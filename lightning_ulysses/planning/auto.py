"""Chooses the parts of memory at the first batch: the user's own step is rehearsed without memory, part after part."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map

from lightning_ulysses import memory
from lightning_ulysses.config import MemoryConfig, read_memory
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.split_plan import SequencePlan
from lightning_ulysses.memory import host
from lightning_ulysses.memory.blocks import find_blocks, refuse_checkpointed
from lightning_ulysses.notes import Notes
from lightning_ulysses.patching.handle import Handle
from lightning_ulysses.planning.lab import blocks_of, drop, measure
from lightning_ulysses.planning.meter import Meter
from lightning_ulysses.planning.plan import LADDER, shown
from lightning_ulysses.planning.render import amount
from lightning_ulysses.planning.stand_ins import HostBytes, on_fake_tensors
from lightning_ulysses.planning.workspaces import flash_attention
from lightning_ulysses.planning.zero import Sharding, state_bytes

_TILES = ("tiled_loss", "tiled_mlp", "tiled_norm")
# Of a GPU, that its allocator leaves unused between tensors.
_GAPS = 0.05
# A peak in proportion to tokens that stays so far below the limit needs no rehearsal.
_NEAR = 1.1
_OWNED = ("_parameters", "_buffers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

#: Runs the loss of the user's step on a batch.
Run = Callable[[Any], Any]


@dataclass(frozen=True)
class Room:
    """Bytes that a step may still take.

    Attributes:
        device: On the device of each process.
        host: In host memory, for each process of the machine.
    """

    device: int
    host: int


def find_room(device: torch.device, processes: int) -> Room:
    """What is free at this moment. On the CPU both kinds are the same memory."""
    free = host.available() or 2**63
    if (limited := host.control_group()) is not None:
        free = min(free, max(limited[0] - limited[1], 0))
    if device.type != "cuda":
        return Room(free // processes, free // processes)
    unused, total = torch.cuda.mem_get_info(device)
    unused += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Room(int(unused - _GAPS * total), free // processes)


def ladder(root: nn.Module, sp_size: int, device: torch.device) -> list[MemoryConfig]:
    """`LADDER` in so far as ``root`` has submodules for it, from what costs least to what takes least."""
    able = {*_tiles(root)}
    if _has(lambda: refuse_checkpointed(root, find_blocks(root, None))):
        able |= {"checkpoint"} | ({"offload"} if device.type == "cuda" else set())
    able |= {"head_chunks"} if sp_size > 1 else set()
    found = [MemoryConfig(**{part: value for part, value in parts.items() if part in able}) for parts in LADDER]
    return list(dict.fromkeys(found))


def gathered_units(root: nn.Module, parts: MemoryConfig | Literal["auto"]) -> list[nn.Module]:
    """The submodules of which ZeRO-3 must gather all parameters at once, whatever is chosen."""
    return memory.units(root, read_memory(dict.fromkeys(_tiles(root), True)) if parts == "auto" else parts)


def _tiles(root: nn.Module) -> list[str]:
    return [part for part in _TILES if _has(partial(memory.parts, root, read_memory({part: True})))]


def _has(find: Callable[[], Any]) -> bool:
    try:
        find()
    except UlyssesError:
        return False
    return True


@dataclass(frozen=True)
class Found:
    """What a rehearsal found.

    Attributes:
        memory: The parts.
        device: Bytes at the peak.
        host: Bytes on the host.
        reason: Why the step could not be rehearsed; empty if it was.
    """

    memory: MemoryConfig
    device: int = 0
    host: int = 0
    reason: str = ""

    def fits(self, room: Room) -> bool:
        """Whether there is room for it."""
        return self.device <= room.device and self.host <= room.host


class AutoMemory:
    """Installs the parts that the longest batch so far needs.

    Args:
        context: Of the run.
        root: The user's module.
        device: Where it is.
        sharding: Of the states, some of which come with the first backward.
        guard: Around a rehearsal: nothing of the step remains.
        forget: See `memory.install`.
        say: Tells the user, on rank 0 only.
    """

    def __init__(
        self,
        context: SequenceContext,
        root: nn.Module,
        device: torch.device,
        sharding: Sharding,
        guard: Callable[[nn.Module], AbstractContextManager[Any]],
        forget: Callable[[], None] | None,
        say: Callable[[str], None] | None,
    ) -> None:
        self._context, self._root, self._device, self._sharding = context, root, device, sharding
        self._guard, self._forget, self._say = guard, forget, say
        self._left = ladder(root, context.mesh.sp_size, device)
        self._found: Found | None = None
        self._longest = 0
        self._handle = Handle()

    def remove(self) -> None:
        """Takes the parts off."""
        self._handle.remove()

    def prepare(self, batch: LocalBatch, run: Run, inputs: Any, plan: SequencePlan | None) -> None:
        """Chooses parts for a batch if it is longer than all before it; a collective.

        Args:
            batch: Cut for this rank.
            run: Runs the user's step.
            inputs: What it gets.
            plan: Where the model is split, if the batch is not.
        """
        tokens = batch.rows * batch.layout.seq_len
        mesh = self._context.mesh
        # Ranks of one group have the same batch.
        if mesh.dp_size == 1 and tokens <= self._longest:
            return
        everyone = self._from_all(tokens)
        most, before = max(everyone), self._longest
        if most <= before:
            return
        self._longest, room = most, self._room()
        if self._found is not None and not self._found.reason:
            grown = most / before * _NEAR
            if Found(self._found.memory, int(self._found.device * grown), int(self._found.host * grown)).fits(room):
                return
        chooser = everyone.index(most)
        chosen = [self._choose(batch, run, inputs, plan, room) if mesh.rank == chooser else None]
        if mesh.world_size > 1:
            dist.broadcast_object_list(chosen, src=chooser, group=mesh.host_group)
        assert chosen[0] is not None
        self._install(chosen[0], room, batch)

    def _from_all(self, mine: Any) -> list[Any]:
        found = [mine] * self._context.mesh.world_size
        if len(found) > 1:
            dist.all_gather_object(found, mine, group=self._context.mesh.host_group)
        return found

    def _room(self) -> Room:
        """The least that any rank has, without what ZeRO makes in the first backward."""
        free = self._from_all(find_room(self._device, memory.neighbours(self._context)))
        parameters = [*self._root.parameters()]
        numel = sum(getattr(each, "ds_numel", each.numel()) for each in parameters if each.requires_grad)
        size = max((each.element_size() for each in parameters), default=2)
        states = state_bytes(numel, 0, self._sharding, size).device
        coming = sum(states.get(cause, 0) for cause in ("gathered parameters", "gradients", "buckets"))
        # Buckets are no larger than what they hold.
        coming = min(coming, 3 * numel * size)
        return Room(min(each.device for each in free) - coming, min(each.host for each in free))

    def _choose(self, batch: LocalBatch, run: Run, inputs: Any, plan: SequencePlan | None, room: Room) -> Found:
        """The first parts that fit, by halving; those that take least if none do."""
        seen: dict[int, Found] = {}
        left = self._left

        def of(place: int) -> Found:
            if place not in seen:
                seen[place] = self._rehearse(left[place], batch, run, inputs, plan)
            return seen[place]

        # Most batches fit as they are; what can be rehearsed shows in the first attempt.
        if (first := of(0)).reason:
            return Found(left[-1], reason=first.reason)
        if first.fits(room):
            return first
        low, high = 1, len(left) - 1
        # Parts whose rehearsal fails, such as checkpoints of blocks that are checkpointed already, do not fit.
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if not of(middle).reason and of(middle).fits(room) else (middle + 1, high)
        last = min(high, len(left) - 1)
        if not of(last).reason:
            return of(last)
        return min((each for each in seen.values() if not each.reason), key=lambda each: each.device)

    def _rehearse(
        self, config: MemoryConfig, batch: LocalBatch, run: Run, inputs: Any, plan: SequencePlan | None
    ) -> Found:
        mode, copies, waiting = FakeTensorMode(allow_non_fake_inputs=True), _Copies(), HostBytes()
        meter = Meter(rounding=512, workspace=flash_attention)
        shares, rank = batch.layout.shares, self._context.mesh.sp_rank
        # On the last ranks but the outer ones, a rank's own tokens travel as well.
        rank = 1 if len(shares) > 2 and shares[1] == shares[rank] else rank
        try:
            with self._guard(self._root), mode, on_fake_tensors(waiting), _faked(self._root, copies):
                shards = {key: copies(value) for key, value in batch.shards.items()}
                given = tree_map(copies, inputs)
                before = [(buffer, buffer._version) for buffer in self._root.buffers()]
                local = LocalBatch(
                    batch.layout, shards, batch.counts, batch.seen, batch.rows, batch.whole, batch.others, notes=Notes()
                )
                ulysses = self._context.mesh.ulysses
                measure(self._root, lambda: _loss(run(given)), local, rank, config, meter, plan=plan, ulysses=ulysses)
                if config.checkpoint != "none" and any(buffer._version != version for buffer, version in before):
                    return Found(config, reason="its blocks write to buffers")
        except Exception as failure:
            # Whatever a step does with values that are not there.
            return Found(config, reason=f"{type(failure).__name__}: {failure}".splitlines()[0])
        blocks = len(blocks_of(self._root, config))
        on_host = sum(count * waiting.footprint(size) for size, count in waiting.sizes.items()) if blocks else 0
        return Found(config, meter.peak, on_host)

    def _install(self, found: Found, room: Room, batch: LocalBatch) -> None:
        if self._found is None or found.memory != self._found.memory:
            self._handle.remove()
            if found.memory.is_on:
                install = partial(memory.install, self._context, self._root, found.memory, self._forget)
                self._handle.add(install(self._say, lenient=True).remove)
        self._found = found
        # Parts that were too large for this batch are too large for longer ones.
        self._left = self._left[self._left.index(found.memory) :]
        if self._context.mesh.rank == 0:
            self._tell(found, room, batch)

    def _tell(self, found: Found, room: Room, batch: LocalBatch) -> None:
        parts = ", ".join(f"{part}={value}" for part, value in shown(found.memory).items()) or "no parts"
        text = f"memory='auto' for {batch.rows} x {self._longest // batch.rows} tokens: {parts}"
        if found.reason:
            warnings.warn(
                f"{text}. The step could not be rehearsed ({found.reason}), so that all parts are on that the model "
                "has. Set memory to what the run needs, such as {'tiled_loss': True}",
                stacklevel=2,
            )
            return
        text += f". Expected at the peak: {amount(found.device)} of {amount(room.device)} that are free for the step"
        text += f", {amount(found.host)} of {amount(room.host)} on the host" if found.host else ""
        if found.fits(room):
            (self._say or _silent)(f"{text}.")
            return
        warnings.warn(
            f"{text}: this is more than there is, with the parts that take least. Raise sp_size, shorten sequences, or "
            "shard more (stage=3)",
            stacklevel=2,
        )


def _silent(text: str) -> None:
    pass


def _loss(output: Any) -> Tensor:
    loss = output["loss"] if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise TypeError(f"a step that returns {type(loss).__name__} and no loss")
    return loss


class _Copies:
    """Tensors without memory of the shapes of others; one for each of these. ZeRO-3's are whole."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Any, Tensor]] = {}

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._made:
            shape = tuple(getattr(value, "ds_shape", value.shape))
            made = torch.zeros(shape, dtype=value.dtype)
            if isinstance(value, nn.Parameter):
                made = nn.Parameter(made, requires_grad=value.requires_grad)
                made.register_post_accumulate_grad_hook(drop)
            self._made[id(value)] = value, made
        return self._made[id(value)][1]


@contextmanager
def _faked(root: nn.Module, copies: _Copies) -> Iterator[None]:
    """Inside, parameters and buffers have no memory, and no hooks run."""
    before = [(vars(inner), {name: vars(inner)[name] for name in (*_OWNED, *_HOOKS)}) for inner in root.modules()]
    try:
        for own, held in before:
            own |= {name: {key: copies(value) for key, value in dict.items(held[name])} for name in _OWNED}
            own |= {name: OrderedDict() for name in _HOOKS}
        yield
    finally:
        for own, held in before:
            own.update(held)
