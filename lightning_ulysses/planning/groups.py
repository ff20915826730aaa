"""How many ranks share a sequence, and which of them exchange heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightning_ulysses.attention.packed import has_varlen
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.query_runs import most_ulysses
from lightning_ulysses.planning.costs import Groups, Machine
from lightning_ulysses.planning.models import Facts


@dataclass(frozen=True)
class Fixed:
    """What the user has decided already; None for what the plan may choose."""

    sp_size: int | Mapping[str, int] | None = None
    stage: int | None = None
    offload_optimizer: bool | None = None
    offload_parameters: bool | None = None
    memory: Mapping[str, Any] | None = None


def sizes(machine: Machine, facts: Facts, seq_len: int, fixed: Fixed) -> tuple[list[int], list[int]]:
    """P within one machine, and beyond it.

    Raises:
        UlyssesError: If there is none.
    """
    most = min(machine.gpus, facts.heads or machine.gpus, seq_len)
    possible = [size for size in range(1, most + 1) if machine.gpus % size == 0]
    if isinstance(fixed.sp_size, Mapping) or (facts.heads and (fixed.sp_size or 0) > facts.heads):
        return [], []
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


def gathering(machine: Machine, facts: Facts, seq_len: int, fixed: Fixed) -> list[Groups]:
    """Groups in which ranks that hold the same heads gather keys: of several machines, or with more ranks than heads.

    Raises:
        UlyssesError: If the user's own does not divide the GPUs.
    """
    given, node, most = fixed.sp_size, machine.gpus_per_node, min(machine.gpus, seq_len)
    if isinstance(given, Mapping):
        wanted = [Groups(given["ulysses"], given["gather"])]
    elif isinstance(given, int):
        wanted = [_heads_inside(given, facts.heads, given)] if facts.heads and given > facts.heads else []
    else:
        possible = [size for size in range(2, most + 1) if size > node and size % node == 0]
        possible += [size for size in range(facts.heads + 1, min(node, most) + 1) if node % size == 0]
        found = [_heads_inside(size, facts.heads, node) for size in possible if machine.gpus % size == 0]
        return [groups for groups in found if facts.heads and groups.gather > 1]
    for groups in wanted:
        if machine.gpus % groups.size or groups.size > seq_len:
            raise UlyssesError(
                f"sp_size={given} for {machine.gpus} GPUs and {seq_len} tokens",
                "a divisor of the GPUs, at most as large as the sequence is long",
                "change sp_size",
            )
    return wanted


def countable(ways: list[Groups], fixed: Fixed) -> list[Groups]:
    """Those of `gathering` that a plan can count.

    Without torch's variable-length kernel, fewer queries than keys are computed in blocks, far too many to rehearse.

    Raises:
        UlyssesError: If the user asks for them, and they cannot be counted.
    """
    if has_varlen():
        return ways
    if ways and fixed.sp_size is not None:
        raise UlyssesError(
            f"sp_size={fixed.sp_size}, for which ranks gather keys, and torch {torch.__version__}",
            "a torch whose varlen_attn takes window_size and enable_gqa, since others compute such attention in blocks "
            "that a plan does not count",
            "plan with a newer torch, or with an sp_size that is at most the number of query heads",
        )
    return []


def _heads_inside(size: int, heads: int, node: int) -> Groups:
    """P ranks of which as many as can be exchange heads inside a machine."""
    ulysses = most_ulysses(max(heads, 1), min(node, size))
    return Groups(ulysses, size // ulysses)
