"""The packs of an epoch and their order, computed from lengths, settings, epoch and ranks alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lightning_ulysses.cost.model import CostModel
from lightning_ulysses.data.balance import Deal, deal, imbalance, no_pack, pack_costs, widen
from lightning_ulysses.data.packing import (
    Ints,
    Overlong,
    Pack,
    Packs,
    Piece,
    best_fit,
    check_overlong,
    fit_to_packs,
    random_order,
)
from lightning_ulysses.errors import UlyssesError

# Pairs (number of data-parallel ranks, packs that these ranks used). Resuming an epoch on another number of ranks adds
# one.
Segments = tuple[tuple[int, int], ...]
# Documents of which 64-bit copies are made at a time.
_SOME = 2**20


@dataclass(frozen=True)
class PackingReport:
    """Statistics of the packing of one epoch.

    Attributes:
        documents: Documents of the dataset.
        overlong: Documents longer than a pack. They were split, truncated or dropped.
        tokens: Tokens in the packs that are trained on.
        lost_tokens: Tokens in no pack, because they were truncated or dropped.
        packs: Packs that are trained on.
        left_out: Packs that ``drop_last`` leaves out.
        fill: Tokens divided by the capacity of the packs that are trained on.
        imbalance: Total time over useful time if every step waits for its slowest rank; 1 is best.
    """

    documents: int
    overlong: int
    tokens: int
    lost_tokens: int
    packs: int
    left_out: int
    fill: float
    imbalance: float


@dataclass(frozen=True)
class PackingSettings:
    """The settings that packs depend on, besides the lengths; see `SequenceShardSampler`.

    Raises:
        UlyssesError: For a setting out of range.
    """

    max_tokens: int
    overlong: Overlong
    window: int
    cost: CostModel
    shuffle: bool
    seed: int
    drop_last: bool

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("window", 2), ("seed", 0)):
            check_whole(name, getattr(self, name), least)
        check_overlong(self.overlong)
        if not isinstance(self.cost, CostModel):
            raise UlyssesError(
                f"cost={self.cost!r}",
                "a CostModel, or None for that of a dense transformer",
                "set cost=CostModel(per_token=..., per_pair=...), or CostModel.from_config(model.config)",
            )


def check_whole(name: str, value: object, least: int) -> None:
    """Raises `UlyssesError` unless ``value`` is an integer from ``least`` to 2**31 - 1."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not least <= value < 2**31:
        raise UlyssesError(f"{name}={value!r}", f"a whole number from {least} to 2**31 - 1", f"change {name}")


def begun(former: Segments, ranks: int, items: int) -> int:
    """Steps of an epoch that count as done on ``ranks`` data-parallel ranks, in whole batches of ``items`` packs.

    Args:
        former: Packs of the epoch that other numbers of ranks have used.
        ranks: Packs per step.
        items: Packs in a batch of one rank.
    """
    batches, followers = 0, [*(size for size, _ in former[1:]), ranks]
    for (size, used), following in zip(former, followers, strict=False):
        # Rounds in the same way as the Trainer's count of batches, see `upstream.lightning.rescale_progress`.
        batches = (batches + used // size // items) * size // following
    return batches * items


class PackingPlan:
    """Packs documents and deals the packs to ranks. Caches the latest epoch.

    Args:
        lengths: (documents,) tokens of each.
        settings: All other settings of the packs.

    Raises:
        UlyssesError: For a document that is too long with ``overlong="error"``.
    """

    def __init__(self, lengths: Ints, settings: PackingSettings) -> None:
        self.lengths = lengths
        self.settings = settings
        self.pieces = fit_to_packs(lengths, settings.max_tokens, settings.overlong)
        self._packed: tuple[int, Packs] | None = None
        self._dealt: tuple[tuple[int, Segments, int, int], Deal] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the packs: the settings, and a digest of the lengths."""
        hashed = hashlib.blake2b(digest_size=8)
        for begin in range(0, len(self.lengths), _SOME):
            hashed.update(self.lengths[begin : begin + _SOME].astype("<i8").tobytes())
        digest = hashed.hexdigest()
        names = ("seed", "max_tokens", "overlong", "window", "shuffle", "drop_last")
        settings = " ".join(f"{name}={getattr(self.settings, name)}" for name in names)
        cost = self.settings.cost
        return f"lengths={len(self.lengths)}:{digest} {settings} cost={cost.per_token!r}+{cost.per_pair!r}"

    def _pack(self, epoch: int) -> Packs:
        count, settings = len(self.pieces), self.settings
        order = random_order(count, settings.seed, epoch, 0) if settings.shuffle else np.arange(count)
        return best_fit(self.pieces.lengths, order, settings.max_tokens, settings.window)

    @cached_property
    def count(self) -> int:
        """The number of packs in every epoch, for any number of data-parallel ranks."""
        first = self._pack(0)
        # The epoch that is most likely to be asked for.
        self._packed = 0, widen(first, count := self._count(len(first)))
        return count

    def _count(self, packs: int) -> int:
        """The number of packs in every epoch, if the first one by itself has ``packs``."""
        tokens = int(self.pieces.lengths.sum(dtype=np.int64))
        if not self.settings.shuffle or tokens < 2 * self.settings.window * self.settings.max_tokens:
            return packs
        # Lightning asks for the length only once, but another epoch may need a few packs more than the first one. In
        # all cases seen, these were less than a twentieth of the room that the first one leaves empty. A tenth is
        # reserved.
        spare = 1 + packs // 5000 + (packs - tokens // self.settings.max_tokens) // 10
        return min(packs + spare, len(self.pieces))

    def packs(self, epoch: int) -> Packs:
        """The `count` packs of an epoch, before they are dealt."""
        epoch, count = epoch if self.settings.shuffle else 0, self.count
        if self._packed is None or self._packed[0] != epoch:
            # Those of the former epoch make room first.
            self._packed = self._dealt = None
            packs = self._pack(epoch)
            # An epoch that needs even more packs takes those of the first epoch, in an order of its own.
            packs = packs if len(packs) <= count else self._pack(0)
            self._packed = epoch, widen(packs, count)
        return self._packed[1]

    def deal(self, epoch: int, former: Segments, ranks: int, items: int = 1) -> Deal:
        """The steps of an epoch on ``ranks`` data-parallel ranks.

        Args:
            epoch: Number of the epoch.
            former: Packs that other numbers of ranks have used of it before.
            ranks: Packs per step.
            items: Packs in a batch of one rank.

        Raises:
            UlyssesError: If a rank would get no pack.
        """
        key = (epoch, former, ranks, items)
        if self._dealt is None or self._dealt[0] != key:
            packs = self.packs(epoch)
            for number, (size, used) in enumerate(former):
                packs = self._deal_rest(packs, epoch, former[:number], size, items).rest(used)
            self._dealt = key, self._deal_rest(packs, epoch, former, ranks, items)
        return self._dealt[1]

    def _deal_rest(self, packs: Packs, epoch: int, former: Segments, ranks: int, items: int) -> Deal:
        """The steps after those of ``former``. With them, this epoch is as long as any other on these ranks.

        Lightning asks for the length only once, and relies on it in every epoch.
        """
        settings = self.settings
        whole = self.count // ranks if settings.drop_last else -(-self.count // ranks)
        slots = (whole - begun(former, ranks, items)) * ranks
        if not slots and not former:
            raise no_pack(packs, ranks)
        if former and (len(packs.members) < slots or (len(packs) > slots and not settings.drop_last)):
            raise UlyssesError(
                f"{len(packs)} packs of {len(packs.members)} documents left of an epoch, for {slots // ranks} steps on "
                f"{ranks} data-parallel ranks",
                "as many documents as make up these steps, each of which has a pack for every rank",
                "resume with the former sp_size, or from a checkpoint taken at another step",
            )
        key = (settings.seed, epoch, 1, len(former)) if settings.shuffle else None
        return deal(packs, self.pieces.lengths, settings.cost, ranks, slots, key=key)

    def pack(self, packs: Packs, number: int) -> Pack:
        """One pack: the number of each whole document, and a `Piece` for each part of a document."""
        members = packs[number]
        index, begin = self.pieces.locate(members)
        tokens = self.pieces.lengths[members]
        entries = Pack(index.tolist())
        for place in np.flatnonzero(tokens < self.lengths[index]):
            entries[place] = Piece(int(index[place]), int(begin[place]), int(begin[place]) + int(tokens[place]))
        return entries

    def report(self, dealt: Deal) -> PackingReport:
        """Statistics of the packs that have been dealt."""
        trained = int(dealt.packs.sums(self.pieces.lengths)[dealt.steps].sum())
        costs = pack_costs(dealt.packs, self.pieces.lengths, self.settings.cost)[dealt.steps]
        return PackingReport(
            documents=len(self.lengths),
            overlong=self.pieces.overlong,
            tokens=trained,
            lost_tokens=self.pieces.lost_tokens,
            packs=dealt.steps.size,
            left_out=len(dealt.left_out),
            fill=trained / max(1, dealt.steps.size * self.settings.max_tokens),
            imbalance=imbalance(costs) if costs.size else 1.0,
        )
