"""Which packs make up a step: equal cost on all data-parallel ranks, and the same number of packs for each."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_ulysses.cost.model import CostModel
from lightning_ulysses.data.packing import Ints, Packs, group, random_order
from lightning_ulysses.errors import UlyssesError

# Packs of like cost are found among this many steps' worth of them. Where the dearest of these costs c times the
# cheapest, ranks wait about ln(c) / SORTED_STEPS of their time: half a percent for c = 10.
SORTED_STEPS = 512


@dataclass(frozen=True)
class Deal:
    """The steps of an epoch, or of what is left of one.

    Attributes:
        packs: All packs; some have been divided to even out the last step.
        steps: (steps, ranks) the pack of each rank in each step.
        left_out: Packs for which there is no full step; empty unless asked for.
        origin: (packs,) the pack, of those dealt, that each is or is a part of.
    """

    packs: Packs
    steps: Ints
    left_out: Ints
    origin: Ints

    def rest(self, used: int) -> Packs:
        """What the first ``used`` packs of the steps leave over, parts of one pack joined again."""
        numbers = np.concatenate([self.steps.ravel()[used:], self.left_out])
        members = np.concatenate([self.packs[number] for number in numbers] or [self.packs.members[:0]])
        return group(members, np.repeat(self.origin[numbers], self.packs.sizes[numbers]))


def pack_costs(packs: Packs, lengths: Ints, cost: CostModel) -> NDArray[np.float64]:
    """(packs,) the cost of each, where ``lengths`` (pieces,) are in tokens."""
    return cost.of(packs.sums(lengths), packs.sums(lengths**2))


def imbalance(costs: NDArray[np.float64]) -> float:
    """Time over useful time when every step waits for its dearest rank; ``costs`` is (steps, ranks)."""
    return float(costs.max(axis=1).sum() / costs.mean(axis=1).sum())


def divide(packs: Packs, chosen: Ints, count: int) -> tuple[Packs, Ints]:
    """Divides some packs at document boundaries until they are ``count``; always the largest, into like halves.

    Args:
        packs: Packs, the longest piece of each first.
        chosen: Which of them to divide; they have at least ``count`` pieces.
        count: How many packs to make of these.

    Returns:
        All packs, with those made at the end, and (packs,) the former number of the pack that each is or is a part of.
    """
    heap = [(-int(packs.sizes[number]), serial, int(number), packs[number]) for serial, number in enumerate(chosen)]
    heapq.heapify(heap)
    for serial in range(len(chosen), count):
        _, former, number, pieces = heapq.heappop(heap)
        # Every other piece, since they are sorted by length.
        for key, half in ((former, pieces[::2]), (serial, pieces[1::2])):
            heapq.heappush(heap, (-len(half), key, number, half))
    touched = np.zeros(len(packs), dtype=bool)
    touched[chosen] = True
    members = np.concatenate(
        [packs.members[np.repeat(~touched, packs.sizes)], *(pieces for _, _, _, pieces in heap)], dtype=np.int64
    )
    sizes = np.concatenate([packs.sizes[~touched], [len(pieces) for _, _, _, pieces in heap]])
    numbers = np.concatenate([np.flatnonzero(~touched), [number for _, _, number, _ in heap]])
    return Packs(members, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)), numbers.astype(np.int64)


def widen(packs: Packs, count: int) -> Packs:
    """Divides packs with many pieces until there are ``count``; never more than there are pieces."""
    extra = min(count, len(packs.members)) - len(packs)
    if extra <= 0:
        return packs
    chosen = np.argsort(-packs.sizes, kind="stable")[:extra]
    return divide(packs, chosen, len(chosen) + extra)[0]


def _even_out(packs: Packs, ranks: int, slots: int) -> tuple[Packs, Ints, int]:
    """Divides as few packs as will do, so that there are ``slots``; the last ones are to be dealt last.

    Args:
        packs: At most ``slots`` of them.
        ranks: Packs per step.
        slots: A multiple of ``ranks``.

    Returns:
        All packs, (packs,) their former numbers, and how many of the last ones have to do with the division.

    Raises:
        UlyssesError: If there are too few documents.
    """
    extra = slots - len(packs)
    if not extra:
        return packs, np.arange(len(packs)), 0
    most = np.argsort(-packs.sizes, kind="stable")
    taken = np.arange(-extra % ranks or ranks, len(packs) + 1, ranks)
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
    """The error for a rank that would have nothing to train on."""
    return UlyssesError(
        f"{len(packs)} packs of {len(packs.members)} documents for {ranks} data-parallel ranks",
        "at least one pack for each rank",
        "use fewer data-parallel ranks, a smaller max_tokens, or more documents",
    )


def deal(packs: Packs, lengths: Ints, cost: CostModel, ranks: int, slots: int, *, key: tuple[int, ...] | None) -> Deal:
    """Chooses the packs of each step among those of like cost.

    Args:
        packs: What to deal.
        lengths: (pieces,) tokens of each piece.
        cost: What a pack costs.
        ranks: Packs per step.
        slots: How many packs the steps take, a multiple of ``ranks``. More than there are has some divided, fewer
            leaves some out.
        key: Names the random order of the steps; None keeps close to the order of the packs.

    Raises:
        UlyssesError: If dividing packs at document boundaries does not make them go round.
    """
    divided = len(packs) < slots
    packs, origin, last = _even_out(packs, ranks, slots) if divided else (packs, np.arange(len(packs)), 0)
    costs = pack_costs(packs, lengths, cost)
    first = len(packs) - last
    order = np.arange(first) if key is None else random_order(first, *key, 0)
    full = slots - last
    order, left_out = order[:full], order[full:]
    steps = order[np.lexsort((costs[order], np.arange(full) // (ranks * SORTED_STEPS)))].reshape(-1, ranks)
    if key is not None:
        steps = steps[random_order(len(steps), *key, 1)]
        places = random_order(full, *key, 2).reshape(steps.shape).argsort(axis=1)
        steps = np.take_along_axis(steps, places, axis=1)
    ending = first + np.argsort(costs[first:], kind="stable")
    return Deal(packs, np.concatenate([steps, ending.reshape(-1, ranks)]), left_out, origin)
