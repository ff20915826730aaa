"""Which sizes, stages and parts fit a machine, and which of them is the fastest."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lightning_ulysses.config import MemoryConfig, read_memory
from lightning_ulysses.planning.costs import (
    Groups,
    Machine,
    StepTime,
    gathered_volume,
    operations,
    sent,
    step_time,
)
from lightning_ulysses.planning.groups import Fixed, countable, gathering, sizes
from lightning_ulysses.planning.lab import Rehearsal, Scene
from lightning_ulysses.planning.models import Facts
from lightning_ulysses.planning.store import Measurements
from lightning_ulysses.planning.zero import Sharding, state_bytes

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
# A guess by proportion that is so far beyond a limit needs no rehearsal.
_FAR = 1.25
# Up to so many times S, a line through the peaks at S and 2 S is followed.
_NEAR = 4
_ENDLESS = 2**40
_STAGES = ((1, False, False), (2, False, False), (3, False, False), (3, True, False), (3, True, True))


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
        is_estimate: Whether activations were not rehearsed for this P but follow from those of another one.
        gather: R, the ranks that hold the same heads and gather keys and values.
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
    is_estimate: bool = False
    gather: int = 1

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
    for group, ways in ((inside, []), (outside, countable(gathering(machine, facts, seq_len, fixed), fixed))):
        larger = None
        for sp_size in reversed(group):
            search = _Search(measurements, machine, seq_len, fixed, Groups(sp_size), larger)
            found.append(search.run())
            larger = search if search.seen else larger
        # Gathered keys do not shrink with P, so that no group tells of another one.
        found += [_Search(measurements, machine, seq_len, fixed, groups).run() for groups in ways]
        if any(choice.limit is None for choice in found):
            break
    return Plan(facts, machine, seq_len, tuple(sorted(found, key=_order)))


def _order(choice: Choice) -> tuple[float, ...]:
    if choice.limit is None:
        return 0.0, -choice.tokens_per_second
    return 1.0, choice.limit.needed / choice.limit.available, choice.peak_gpu_bytes


@dataclass(frozen=True)
class _Line:
    """Activations of one way to run, which grow linearly with S on the device."""

    at: Rehearsal
    fixed: float
    seq_len: int
    blocks: int

    def device(self, seq_len: float) -> float:
        """Bytes at the peak."""
        return self.fixed + (self.at.on_device(self.blocks) - self.fixed) * (seq_len / self.seq_len)

    def host(self, seq_len: float) -> int:
        """Bytes of one process on the host."""
        return self.at.on_host(self.blocks, seq_len / self.seq_len)


class _Search:
    """Looks for the fastest way for one P. Only what has to be known is rehearsed.

    Args:
        measurements: Of the model.
        machine: What there is.
        seq_len: S.
        fixed: What is decided.
        groups: U and R.
        larger: The search for a larger P.

    Attributes:
        seen: Rehearsals at S, by their place in the ladder.
        place: In the ladder, of the first parts that fit; of the last ones if none do.
    """

    def __init__(
        self,
        measurements: Measurements,
        machine: Machine,
        seq_len: int,
        fixed: Fixed,
        groups: Groups,
        larger: _Search | None = None,
    ) -> None:
        self._measurements, self._facts, self._larger = measurements, measurements.facts, larger
        self._machine, self._seq_len, self._fixed, self._sp_size = machine, seq_len, fixed, groups.size
        self._groups = groups
        self._ladder = [read_memory(parts) for parts in ([fixed.memory] if fixed.memory is not None else LADDER)]
        self.seen: dict[int, Rehearsal] = {}
        self.place = len(self._ladder) - 1

    def run(self) -> Choice:
        """The fastest that fits, or the one that takes least."""
        low, last = self._first_near(), self.place
        if (guess := self._by_proportion(last)) is not None:
            return self._guessed(guess)
        if self._larger is not None:
            # Slices of twice the length often need the following parts.
            best = self._of(low)
            while best.limit is not None and low < last:
                low += 1
                best = self._of(low)
            self.place = low
            return self._with_longest(best)
        best = self._of(last)
        if best.limit is None:
            # Each step of the ladder takes less memory and more time than the one before.
            while low < self.place:
                middle = (low + self.place) // 2
                choice = self._of(middle)
                if choice.limit is None:
                    self.place, best = middle, min(best, choice, key=_order)
                else:
                    low = middle + 1
        return self._with_longest(best)

    def _first_near(self) -> int:
        """The first parts that may fit: those before it do not on a larger P, or are far from fitting here."""
        place = self._larger.place if self._larger is not None else 0
        while place < self.place and self._by_proportion(place) is not None:
            place += 1
        return place

    def _by_proportion(self, step: int) -> Choice | None:
        """What some parts take, if the shorter slices of a larger P tell that it is far from fitting; else None."""
        # One rank exchanges nothing, and takes less than in proportion.
        if self._larger is None or self._sp_size == 1 or step not in self._larger.seen:
            return None
        found, blocks = self._larger.seen[step], self._facts.blocks
        stretch = self._larger._sp_size / self._sp_size
        causes = {"activations, by proportion": int(found.on_device(blocks) * stretch)}
        waiting = found.on_host(blocks, stretch)
        best = min((self._choice(self._ladder[step], each, causes, waiting) for each in self._shardings()), key=_order)
        is_far = best.limit is not None and best.limit.needed >= _FAR * best.limit.available
        return best if is_far else None

    def _guessed(self, guess: Choice) -> Choice:
        assert self._larger is not None
        line, stretch = self._larger._line(self._ladder[-1]), self._larger._sp_size / self._sp_size
        return replace(guess, longest_seq_len=self._longest(guess, line, stretch), is_estimate=True)

    def _of(self, step: int) -> Choice:
        memory = self._ladder[step]
        found, blocks = self._rehearsal(memory), self._facts.blocks
        self.seen[step] = found
        causes = {f"activations: {cause}": number for cause, number in found.by_cause(blocks).items() if number}
        choices = [self._choice(memory, each, causes, found.on_host(blocks)) for each in self._shardings()]
        return min(choices, key=_order)

    def _shardings(self) -> list[Sharding]:
        fixed, found = self._fixed, []
        for given in _STAGES:
            wanted = (fixed.stage, fixed.offload_optimizer, fixed.offload_parameters)
            if all(one is None or one == other for one, other in zip(wanted, given, strict=True)):
                found.append(Sharding(given[0], self._machine.gpus, given[1], given[2]))
        stage = 2 if fixed.stage is None else fixed.stage
        other = Sharding(stage, self._machine.gpus, bool(fixed.offload_optimizer), bool(fixed.offload_parameters))
        return found or [other]

    def _rehearsal(self, memory: MemoryConfig, times: int = 1) -> Rehearsal:
        return self._measurements.rehearsal(scene_of(times * self._seq_len, self._groups, memory))

    def _line(self, memory: MemoryConfig, times: int = 1) -> _Line:
        at, blocks = self._rehearsal(memory, times), self._facts.blocks
        fixed: float | None = at.fixed
        # Longer slices would fill tiles that are not full yet. A row keeps its hidden state at least.
        if fixed is None or times * self._seq_len // self._sp_size < memory.rows(2 * max(self._facts.hidden, 1)):
            fixed = 2 * at.on_device(blocks) - self._rehearsal(memory, 2 * times).on_device(blocks)
        return _Line(at, fixed, times * self._seq_len, blocks)

    def _choice(self, memory: MemoryConfig, sharding: Sharding, causes: dict[str, int], waiting: int) -> Choice:
        facts, machine, seq_len = self._facts, self._machine, self._seq_len
        states, neighbours = state_bytes(facts.numel, facts.largest, sharding), machine.neighbours
        gpu = {**states.device, **causes, "reserve": machine.reserve}
        # The optimizer steps when no activation lives.
        excess = states.step - sum(causes.values()) - states.device.get("gathered parameters", 0)
        if excess > 0:
            gpu["gradients in float32, in the optimizer's step"] = excess
        host = {cause: number * neighbours for cause, number in states.host.items()}
        if waiting:
            host["activations"] = waiting * neighbours
        time = step_time(facts, seq_len, self._groups, memory, sharding, machine, waiting)
        count = machine.gpus // self._sp_size
        return Choice(
            sp_size=self._sp_size,
            dp_size=count,
            sharding=sharding,
            parts=shown(memory),
            gpu=gpu,
            host=host,
            limit=_limit(sum(gpu.values()), sum(host.values()), machine),
            longest_seq_len=0,
            time=time,
            tokens_per_second=count * seq_len / time.total,
            exchange_bytes=sum(sent(facts, seq_len, self._groups, memory)),
            gathered_bytes=gathered_volume(facts, seq_len, self._sp_size, memory),
            flops=operations(facts, seq_len, memory) / self._sp_size,
            gather=self._groups.gather,
        )

    def _with_longest(self, choice: Choice) -> Choice:
        memory = read_memory(choice.parts)
        longest = self._longest(choice, self._line(memory))
        # From far away, tiles that were not full yet would mislead.
        if _NEAR * self._seq_len < longest < _ENDLESS:
            longest = self._longest(choice, self._line(memory, longest // self._seq_len))
        return replace(choice, longest_seq_len=longest)

    def _longest(self, choice: Choice, line: _Line, stretch: float = 1.0) -> int:
        """The most tokens that fit: found by halving, since buffers on the host grow in steps."""
        facts, machine = self._facts, self._machine
        states = state_bytes(facts.numel, facts.largest, choice.sharding)
        rest, host = sum(states.device.values()) + machine.reserve, sum(states.host.values()) * machine.neighbours

        def fits(seq_len: int) -> bool:
            device = rest + line.device(seq_len * stretch)
            return (
                device <= machine.gpu_memory
                and host + line.host(seq_len * stretch) * machine.neighbours <= machine.host_memory
            )

        low, high = 0, _ENDLESS
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low


def scene_of(seq_len: int, groups: Groups, memory: MemoryConfig) -> Scene:
    """The step of one rank."""
    return Scene(seq_len, groups.size, memory, ulysses=groups.ulysses if groups.gather > 1 else None)


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
