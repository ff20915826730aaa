"""Which sizes, stages and parts fit a machine, and which of them is the fastest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lightning_ulysses.config import MemoryConfig, read_memory
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.planning.costs import (
    Machine,
    StepTime,
    gathered_volume,
    operations,
    step_time,
    ulysses_volume,
)
from lightning_ulysses.planning.lab import Scene
from lightning_ulysses.planning.models import Facts
from lightning_ulysses.planning.store import Measurements
from lightning_ulysses.planning.zero import Sharding, StateBytes, state_bytes

_TILES: dict[str, Any] = {"tiled_loss": True, "tiled_mlp": True, "tiled_norm": True}
#: Parts from what costs least time to what takes least memory.
LADDER: tuple[dict[str, Any], ...] = (
    {},
    {"tiled_loss": True},
    {"tiled_loss": True, "checkpoint": "block+attention"},
    {**_TILES, "checkpoint": "block+attention"},
    {**_TILES, "checkpoint": "block"},
    {**_TILES, "checkpoint": "block+attention", "offload": "cpu", "head_chunks": "auto"},
    {**_TILES, "checkpoint": "block", "offload": "cpu", "head_chunks": "auto"},
)
_KEPT = "activations: kept for the backward"
_STAGES = ((1, False, False), (2, False, False), (3, False, False), (3, True, False), (3, True, True))


@dataclass(frozen=True)
class Fixed:
    """What the user has decided already; None for what the plan may choose."""

    sp_size: int | None = None
    stage: int | None = None
    offload_optimizer: bool | None = None
    offload_parameters: bool | None = None
    memory: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Limit:
    """The memory that is too small.

    Attributes:
        name: ``"GPU"`` or ``"host"``.
        needed: Bytes.
        available: Bytes.
    """

    name: str
    needed: int
    available: int


@dataclass(frozen=True)
class Choice:
    """One way to run.

    Attributes:
        sp_size: P.
        dp_size: Groups.
        sharding: Of the states.
        parts: Keys of ``memory`` that are on.
        gpu: Bytes of one GPU by cause, at the peak.
        host: Bytes of one machine by cause.
        limit: What is too small; None if it fits.
        longest_seq_len: The most tokens that fit.
        time: Of a step.
        tokens_per_second: Of all groups.
        exchange_bytes: What one rank sends in a step.
        gathered_bytes: What it would receive if keys and values were gathered instead.
        flops: Operations of a step on one GPU.
    """

    sp_size: int
    dp_size: int
    sharding: Sharding
    parts: dict[str, Any]
    gpu: dict[str, int]
    host: dict[str, int]
    limit: Limit | None
    longest_seq_len: int
    time: StepTime
    tokens_per_second: float
    exchange_bytes: float
    gathered_bytes: float
    flops: float

    @property
    def peak_gpu_bytes(self) -> int:
        """Of one GPU, with the reserve."""
        return sum(self.gpu.values())

    @property
    def peak_host_bytes(self) -> int:
        """Of one machine."""
        return sum(self.host.values())


@dataclass(frozen=True)
class Plan:
    """The answer.

    Attributes:
        facts: Of the model.
        machine: As it was asked for.
        seq_len: S.
        choices: For each P the fastest way that fits, else the one that takes least; the best of all first.
    """

    facts: Facts
    machine: Machine
    seq_len: int
    choices: tuple[Choice, ...] = field(default_factory=tuple)

    @property
    def best(self) -> Choice:
        """The fastest that fits, or the one that comes nearest."""
        return self.choices[0]


def make_plan(measurements: Measurements, machine: Machine, seq_len: int, fixed: Fixed | None = None) -> Plan:
    """Plans a run.

    Args:
        measurements: Of the model.
        machine: What there is.
        seq_len: S.
        fixed: What is decided.

    Raises:
        UlyssesError: If no sizes divide the GPUs.
    """
    fixed = fixed or Fixed()
    facts = measurements.facts
    inside, outside = sizes(machine, facts, seq_len, fixed)
    found: list[Choice] = []
    # Larger groups leave their machine only if they must.
    for group in (inside, outside):
        found += [_Search(measurements, machine, seq_len, fixed, sp_size).run() for sp_size in group]
        if any(choice.limit is None for choice in found):
            break
    return Plan(facts, machine, seq_len, tuple(sorted(found, key=_order)))


def sizes(machine: Machine, facts: Facts, seq_len: int, fixed: Fixed) -> tuple[list[int], list[int]]:
    """P within one machine, and beyond it.

    Raises:
        UlyssesError: If there is none.
    """
    most = min(machine.gpus, facts.heads or machine.gpus, seq_len)
    possible = [size for size in range(1, most + 1) if machine.gpus % size == 0]
    if fixed.sp_size is not None:
        if fixed.sp_size not in possible:
            raise UlyssesError(
                f"sp_size={fixed.sp_size} for {machine.gpus} GPUs and {facts.heads} query heads",
                "a divisor of the GPUs, at most as large as the heads",
                f"set sp_size to one of {possible}",
            )
        possible = [fixed.sp_size]
    node = machine.gpus_per_node
    inside = [size for size in possible if size <= node and node % size == 0]
    outside = [size for size in possible if size > node and size % node == 0]
    if fixed.sp_size is not None or not inside:
        return possible, []
    return inside, outside


def _order(choice: Choice) -> tuple[float, ...]:
    if choice.limit is None:
        return 0.0, -choice.tokens_per_second
    return 1.0, choice.limit.needed / choice.limit.available


class _Search:
    """Looks for the fastest way for one P. Only what has to be known is rehearsed."""

    def __init__(self, measurements: Measurements, machine: Machine, seq_len: int, fixed: Fixed, sp_size: int) -> None:
        self._measurements, self._facts = measurements, measurements.facts
        self._machine, self._seq_len, self._fixed, self._sp_size = machine, seq_len, fixed, sp_size
        self._ladder = [read_memory(parts) for parts in ([fixed.memory] if fixed.memory is not None else LADDER)]

    def run(self) -> Choice:
        """The fastest that fits, or the one that takes least."""
        low, high = 0, len(self._ladder) - 1
        best = self._of(high)
        if best.limit is None:
            # Each step of the ladder takes less memory and more time than the one before.
            while low < high:
                middle = (low + high) // 2
                choice = self._of(middle)
                if choice.limit is None:
                    high, best = middle, min(best, choice, key=_order)
                else:
                    low = middle + 1
        return self._with_longest(best)

    def _of(self, step: int) -> Choice:
        memory = self._ladder[step]
        choices = [self._choice(memory, sharding) for sharding in self._shardings()]
        return min(choices, key=_order)

    def _shardings(self) -> list[Sharding]:
        fixed, found = self._fixed, []
        for stage, optimizer, parameters in _STAGES:
            wanted = (fixed.stage, fixed.offload_optimizer, fixed.offload_parameters)
            given = (stage, optimizer, parameters)
            if all(one is None or one == other for one, other in zip(wanted, given, strict=True)):
                found.append(Sharding(stage, self._machine.gpus, optimizer, parameters))
        stage = 2 if fixed.stage is None else fixed.stage
        return found or [
            Sharding(stage, self._machine.gpus, bool(fixed.offload_optimizer), bool(fixed.offload_parameters))
        ]

    def _scene(self, memory: MemoryConfig, seq_len: int | None = None) -> Scene:
        return Scene(seq_len or self._seq_len, self._sp_size, memory)

    def _activations(self, memory: MemoryConfig, seq_len: int) -> tuple[int, int]:
        """Bytes of activations on one GPU, and of what waits on the host."""
        found, blocks = self._measurements.peak(self._scene(memory, seq_len)), self._facts.blocks
        if not found.blocks:
            return found.peak, found.host
        host = found.host * (blocks - 1) // max(found.blocks - 1, 1)
        return found.peak + found.per_block * (blocks - found.blocks), host

    def _states(self, sharding: Sharding) -> StateBytes:
        return state_bytes(self._facts.numel, self._facts.largest, sharding)

    def _choice(self, memory: MemoryConfig, sharding: Sharding) -> Choice:
        facts, machine, seq_len = self._facts, self._machine, self._seq_len
        peak, waiting = self._activations(memory, seq_len)
        states, neighbours = self._states(sharding), machine.neighbours
        gpu = {
            **states.device,
            **activations_by_cause(self._measurements, facts, self._scene(memory)),
            "reserve": machine.reserve,
        }
        # The optimizer steps when no activation lives.
        excess = states.step - peak - states.device.get("gathered parameters", 0)
        if excess > 0:
            gpu["gradients in float32, in the optimizer's step"] = excess
        host = {cause: number * neighbours for cause, number in states.host.items()}
        if waiting:
            host["activations"] = waiting * neighbours
        time = step_time(facts, seq_len, self._sp_size, memory, sharding, machine, waiting)
        groups = machine.gpus // self._sp_size
        return Choice(
            sp_size=self._sp_size,
            dp_size=groups,
            sharding=sharding,
            parts=shown(memory),
            gpu=gpu,
            host=host,
            limit=_limit(sum(gpu.values()), sum(host.values()), machine),
            longest_seq_len=0,
            time=time,
            tokens_per_second=groups * seq_len / time.total,
            exchange_bytes=ulysses_volume(facts, seq_len, self._sp_size, memory) if self._sp_size > 1 else 0.0,
            gathered_bytes=gathered_volume(facts, seq_len, self._sp_size, memory),
            flops=operations(facts, seq_len, memory) / self._sp_size,
        )

    def _with_longest(self, choice: Choice) -> Choice:
        """The choice with the most tokens that fit: peaks grow linearly with S."""
        memory, machine = read_memory(choice.parts), self._machine
        at, twice = (self._activations(memory, length) for length in (self._seq_len, 2 * self._seq_len))
        rest = choice.peak_gpu_bytes - at[0]
        host = choice.peak_host_bytes - at[1] * machine.neighbours
        longest = min(
            _reach(self._seq_len, at[0], twice[0], machine.gpu_memory - rest),
            _reach(self._seq_len, at[1], twice[1], (machine.host_memory - host) // machine.neighbours),
        )
        values = {each.name: getattr(choice, each.name) for each in fields(Choice)}
        return Choice(**{**values, "longest_seq_len": max(int(longest), 0)})


def _reach(seq_len: int, at: int, twice: int, available: int) -> float:
    """The length at which a line through two peaks, at S and 2 S, meets what is available."""
    slope = (twice - at) / seq_len
    return seq_len + (available - at) / slope if slope > 0 else float(2**40)


def _limit(gpu: int, host: int, machine: Machine) -> Limit | None:
    limits = [
        Limit("GPU", gpu, machine.gpu_memory),
        Limit("host", host, machine.host_memory),
    ]
    # The first one that a longer sequence would meet.
    worst = max(limits, key=lambda limit: limit.needed / max(limit.available, 1))
    return worst if worst.needed > worst.available else None


def shown(memory: MemoryConfig) -> dict[str, Any]:
    """The settings that differ from their defaults."""
    plain = asdict(MemoryConfig())
    return {key: value for key, value in asdict(memory).items() if value != plain[key]}


def causes_at(measurements: Measurements, plan: Plan) -> Callable[[int], dict[str, int]]:
    """Bytes of one GPU by cause over S, for the best choice, on the line through the peaks at S and at 2 S."""
    best, seq_len = plan.best, plan.seq_len
    memory = read_memory(best.parts)
    here, there = (
        activations_by_cause(measurements, plan.facts, Scene(length, best.sp_size, memory))
        for length in (seq_len, 2 * seq_len)
    )
    states = {cause: number for cause, number in best.gpu.items() if cause not in here}

    def at(length: int) -> dict[str, int]:
        part = (length - seq_len) / seq_len
        found = {cause: here.get(cause, 0) for cause in (*here, *there)}
        return states | {
            cause: max(int(number + part * (there.get(cause, 0) - number)), 0) for cause, number in found.items()
        }

    return at


def activations_by_cause(measurements: Measurements, facts: Facts, scene: Scene) -> dict[str, int]:
    """Bytes at the peak of the whole model by cause."""
    found = measurements.peak(scene)
    further = found.per_block * (facts.blocks - found.blocks) if found.blocks else 0
    causes = {f"activations: {cause}": number for cause, number in found.causes.items() if number}
    causes[_KEPT] = causes.get(_KEPT, 0) + further
    return {cause: number for cause, number in causes.items() if number}
