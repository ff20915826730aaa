"""What a step sends and computes, and how long that takes."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_ulysses.config import MemoryConfig
from lightning_ulysses.geometry.query_runs import QueryRuns
from lightning_ulysses.planning.models import Facts
from lightning_ulysses.planning.zero import Sharding


@dataclass(frozen=True)
class Machine:
    """The machines of a run.

    Attributes:
        gpus: Of the run.
        gpus_per_node: On one machine.
        gpu_memory: Bytes of one GPU.
        host_memory: Bytes of one machine.
        flops: Operations that a GPU does in a second in training, not those of its data sheet.
        node_link: Bytes that a GPU sends in a second to others of its machine.
        network: Bytes that a GPU sends in a second to other machines.
        host_link: Bytes that a GPU copies in a second to or from its host.
        reserve: Bytes of a GPU that are not handed out: the context of CUDA, buffers of NCCL, and gaps.
    """

    gpus: int = 8
    gpus_per_node: int = 8
    gpu_memory: int = 80 * 2**30
    host_memory: int = 2**40
    flops: float = 400e12
    node_link: float = 200e9
    network: float = 40e9
    host_link: float = 20e9
    reserve: int = 3 * 2**30

    @property
    def neighbours(self) -> int:
        """Processes of the run on one machine."""
        return min(self.gpus, self.gpus_per_node)


@dataclass(frozen=True)
class Groups:
    """How a sequence-parallel group is divided.

    Attributes:
        ulysses: U, the ranks that exchange heads.
        gather: R, the ranks that hold the same heads and gather their keys and values.
    """

    ulysses: int
    gather: int = 1

    @property
    def size(self) -> int:
        """P."""
        return self.ulysses * self.gather


def passes(memory: MemoryConfig) -> tuple[float, float]:
    """Forwards' worth of work in a step: of what is per token, and of attention.

    A backward takes two forwards; that of attention 2.5, since kernels compute scores again in it.
    """
    again = memory.checkpoint != "none"
    return 3.0 + again, 3.5 + (memory.checkpoint == "block")


def operations(facts: Facts, seq_len: int, memory: MemoryConfig) -> float:
    """Operations of one step on one sequence, on all of its ranks together."""
    dense, attention = passes(memory)
    # Of logits that are computed tile by tile, those of the backward come on top.
    head = 2.0 * facts.hidden * facts.vocab * seq_len if memory.tiled_loss and memory.checkpoint == "none" else 0.0
    return dense * facts.per_token * seq_len + attention * facts.per_pair * float(seq_len) ** 2 + head


def ulysses_volume(facts: Facts, seq_len: int, sp_size: int, memory: MemoryConfig, size: int = 2) -> float:
    """Bytes that one rank sends in the exchanges of a step."""
    share = seq_len / sp_size
    # Key/value heads that several ranks need are sent to each of them.
    kv_heads = max(facts.kv_heads, sp_size)
    once = (2 * facts.heads + 2 * kv_heads) * facts.head_dim * share * size * (sp_size - 1) / sp_size
    return facts.blocks * once * _exchanges(memory)


def _exchanges(memory: MemoryConfig) -> int:
    """How often a step exchanges what attention takes and gives."""
    times = {"none": 2, "block": 3, "block+attention": 3}[memory.checkpoint]
    # The backward of chunks exchanges what it needs again; with kept outputs every backward does so.
    return times + (memory.cuts_heads and memory.checkpoint != "block+attention")


def sent(facts: Facts, seq_len: int, groups: Groups, memory: MemoryConfig, size: int = 2) -> tuple[float, float]:
    """Bytes that one rank sends in a step with causal attention, in the mean over ranks.

    Returns:
        To the ranks with which it exchanges heads, and to those that hold the same ones.
    """
    held = seq_len / groups.gather
    heads = ulysses_volume(facts, int(held), groups.ulysses, memory, size) if groups.ulysses > 1 else 0.0
    runs = QueryRuns((2,) * groups.gather, is_balanced=True)
    moved = sum(runs.taker(part) != part // 2 for part in range(len(runs.parts))) / len(runs.parts)
    # Keys and values go to all others; queries and outputs to the rank that attends with them.
    keys = 2 * max(facts.kv_heads / groups.ulysses, 1) * (groups.gather - 1)
    queries = 2 * facts.heads / groups.ulysses * moved
    return heads, facts.blocks * _exchanges(memory) * (keys + queries) * facts.head_dim * held * size


def gathered_volume(facts: Facts, seq_len: int, sp_size: int, memory: MemoryConfig, size: int = 2) -> float:
    """Bytes that one rank would receive if all keys and values were gathered, or travelled in a ring."""
    once = 2 * facts.kv_heads * facts.head_dim * (seq_len / sp_size) * size * (sp_size - 1)
    return facts.blocks * once * (2 if memory.checkpoint == "none" else 3)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on one process.

    Attributes:
        compute: Kernels.
        exchange: All-to-alls of attention, beside which nothing runs.
        states: What ZeRO sends and copies, in so far as it takes longer than the kernels.
    """

    compute: float
    exchange: float
    states: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.exchange + self.states


def step_time(
    facts: Facts, seq_len: int, groups: Groups, memory: MemoryConfig, sharding: Sharding, machine: Machine, host: int
) -> StepTime:
    """The time of a step with one sequence on each group.

    Args:
        facts: Of the model.
        seq_len: S.
        groups: U and R.
        memory: Parts.
        sharding: Of the states.
        machine: Speeds.
        host: Bytes of activations that wait on the host.
    """
    compute = operations(facts, seq_len, memory) / groups.size / machine.flops
    near, far = (
        machine.node_link if size <= machine.gpus_per_node else machine.network
        for size in (groups.ulysses, groups.size)
    )
    heads, keys = sent(facts, seq_len, groups, memory)
    exchange = heads / near + keys / far
    # Gradients are scattered and parameters gathered; at stage 3 parameters are gathered for each pass.
    rounds = 2 if sharding.stage < 3 else 3 + (memory.checkpoint != "none")
    across = machine.network if sharding.world > machine.gpus_per_node else machine.node_link
    states = rounds * 2.0 * facts.numel / across if sharding.world > 1 else 0.0
    # There and back.
    copied = 2.0 * host / machine.host_link
    own = facts.numel / sharding.world
    if sharding.offload_optimizer:
        copied += 4.0 * own / machine.host_link
    if sharding.offload_parameters:
        copied += rounds * 2.0 * own / machine.host_link
    return StepTime(compute, exchange, max(states - compute, 0.0) + max(copied - compute, 0.0))
