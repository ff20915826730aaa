"""Balances steps: all data-parallel ranks get equally many packs, of similar cost within a step."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_ulysses.cost.model import CostModel
from lightning_ulysses.data.packing import Ints, Packs, group, random_order
from lightning_ulysses.errors import UlyssesError

# Packs of similar cost are searched for among this many steps' worth of packs. If the most expensive of them costs c
# times the cheapest, ranks wait about ln(c) / SORTED_STEPS of their time. For c = 10 that is half a percent.
SORTED_STEPS = 512


@dataclass(frozen=True)
class Deal:
    """The steps of an epoch, or of the rest of an epoch.

    Attributes:
        packs: All packs. Some have been split to fill the last step.
        steps: (steps, ranks) the pack of each rank in each step.
        left_out: Packs that are in no step. Empty unless fewer slots than packs were asked for.
        origin: (packs,) for each pack the number of the original pack that it is, or that it is a part of.
    """

    packs: Packs
    steps: Ints
    left_out: Ints
    origin: Ints

    def rest(self, used: int) -> Packs:
        """The packs that remain after the first ``used`` ones of the steps. Parts of one original pack are joined."""
        numbers = np.concatenate([self.steps.ravel()[used:], self.left_out])
        members = np.concatenate([self.packs[number] for number in numbers] or [self.packs.members[:0]])
        return group(members, np.repeat(self.origin[numbers], self.packs.sizes[numbers]))


def pack_costs(packs: Packs, lengths: Ints, cost: CostModel) -> NDArray[np.float64]:
    """(packs,) the cost of each pack, with ``lengths`` (pieces,) in tokens."""
    return cost.of(packs.sums(lengths), packs.sums(lengths, power=2))


def imbalance(costs: NDArray[np.float64]) -> float:
    """Total time over useful time if every step waits for its slowest rank; ``costs`` is (steps, ranks)."""
    return float(costs.max(axis=1).sum() / costs.mean(axis=1).sum())


def divide(packs: Packs, chosen: Ints, count: int) -> tuple[Packs, Ints]:
    """Splits some packs between documents until they have become ``count`` packs.

    Each time, the pack with the most pieces is cut into two halves of similar size.

    Args:
        packs: Packs. Within each, the longest piece comes first.
        chosen: Numbers of the packs to split. Together they have at least ``count`` pieces.
        count: How many packs to make of the chosen ones.

    Returns:
        All packs, with the new ones at the end. And (packs,) for each the number of the former pack that it is, or that
        it is a part of.
    """
    heap = [(-int(packs.sizes[number]), serial, int(number), packs[number]) for serial, number in enumerate(chosen)]
    heapq.heapify(heap)
    for serial in range(len(chosen), count):
        _, former, number, pieces = heapq.heappop(heap)
        # Pieces are sorted by length, so taking every other one gives both halves long and short pieces.
        for key, half in ((former, pieces[::2]), (serial, pieces[1::2])):
            heapq.heappush(heap, (-len(half), key, number, half))
    touched = np.zeros(len(packs), dtype=bool)
    touched[chosen] = True
    members = np.concatenate(
        [packs.members[np.repeat(~touched, packs.sizes)], *(pieces for _, _, _, pieces in heap)],
        dtype=packs.members.dtype,
    )
    sizes = np.concatenate([packs.sizes[~touched], [len(pieces) for _, _, _, pieces in heap]])
    numbers = np.concatenate([np.flatnonzero(~touched), [number for _, _, number, _ in heap]])
    return Packs(members, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)), numbers.astype(np.int64)


def widen(packs: Packs, count: int) -> Packs:
    """Splits packs with many pieces until there are ``count`` packs, or one pack for each piece."""
    extra = min(count, len(packs.members)) - len(packs)
    if extra <= 0:
        return packs
    chosen = np.argsort(-packs.sizes, kind="stable")[:extra]
    return divide(packs, chosen, len(chosen) + extra)[0]


def _even_out(packs: Packs, ranks: int, slots: int) -> tuple[Packs, Ints, int]:
    """Splits as few packs as possible, so that there are ``slots`` packs.

    Args:
        packs: At most ``slots`` packs.
        ranks: Packs per step.
        slots: A multiple of ``ranks``.

    Returns:
        All packs, (packs,) their former numbers, and how many packs at the end come from the split. These fill whole
        steps and must be dealt last.

    Raises:
        UlyssesError: If there are too few documents.
    """
    extra = slots - len(packs)
    if not extra:
        return packs, np.arange(len(packs)), 0
    most = np.argsort(-packs.sizes, kind="stable")
    # How many packs may be taken for the split, so that with the extra ones they fill whole steps.
    taken = np.arange(-extra % ranks or ranks, len(packs) + 1, ranks)
    # The taken packs must hold at least one piece for each of the resulting packs.
    enough = np.flatnonzero(np.cumsum(packs.sizes[most])[taken - 1] >= taken + extra)
    if enough.size:
        chosen = most[: taken[enough[0]]]
        count = len(chosen) + extra
        return *divide(packs, chosen, count), count
    if len(packs) < ranks:
        raise no_pack(packs, ranks)
    raise UlyssesError(
        f"{len(packs)} packs of {len(packs.members)} documents for {slots // ranks} steps on {ranks} data-parallel "
        "ranks",
        "a number of packs that goes round, or enough documents to divide some packs",
        f"set drop_last=True, which leaves out up to {ranks - 1} packs of each epoch",
    )


def no_pack(packs: Packs, ranks: int) -> UlyssesError:
    """The error for a rank that would have no pack to train on."""
    return UlyssesError(
        f"{len(packs)} packs of {len(packs.members)} documents for {ranks} data-parallel ranks",
        "at least one pack for each rank",
        "use fewer data-parallel ranks, a smaller max_tokens, or more documents",
    )


def deal(packs: Packs, lengths: Ints, cost: CostModel, ranks: int, slots: int, *, key: tuple[int, ...] | None) -> Deal:
    """Chooses the packs of each step among packs of similar cost.

    Args:
        packs: The packs to deal.
        lengths: (pieces,) tokens of each piece.
        cost: The cost of a pack.
        ranks: Packs per step.
        slots: How many packs the steps take, a multiple of ``ranks``. With more slots than packs, some packs are split.
            With fewer, some packs are left out.
        key: Key of the random order of the steps. None roughly keeps the order of the packs.

    Raises:
        UlyssesError: If splitting packs between documents does not fill the slots.
    """
    divided = len(packs) < slots
    packs, origin, last = _even_out(packs, ranks, slots) if divided else (packs, np.arange(len(packs)), 0)
    costs = pack_costs(packs, lengths, cost)
    first = len(packs) - last
    order = np.arange(first) if key is None else random_order(first, *key, 0)
    full = slots - last
    order, left_out = order[:full], order[full:]
    # Sorts by cost within blocks of SORTED_STEPS steps, so that neighbours, which share a step, cost about the same.
    steps = order[np.lexsort((costs[order], np.arange(full) // (ranks * SORTED_STEPS)))].reshape(-1, ranks)
    if key is not None:
        steps = steps[random_order(len(steps), *key, 1)]
        # Shuffles within each step. Otherwise rank 0 would always get the cheapest pack.
        places = random_order(full, *key, 2).reshape(steps.shape).argsort(axis=1)
        steps = np.take_along_axis(steps, places, axis=1)
    # The packs that come from the split fill the last steps, sorted by cost as well.
    ending = first + np.argsort(costs[first:], kind="stable")
    return Deal(packs, np.concatenate([steps, ending.reshape(-1, ranks)]), left_out, origin)
