"""Makes what a step logs that of the whole batch: a slice's value is weighted, and added up over the group.

Which weights are right is no belief either: the trial of the step compares what slices log with what the whole logs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ulysses.context import LocalBatch
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.patching.outside_graphs import eager

#: The rule of a value that adds up over slices; other rules name the tensor whose targets weight it.
ADDED_UP = ""


@dataclass(frozen=True)
class Logged:
    """What one rank logs, whole and on its slice.

    Attributes:
        whole: Numbers by name.
        part: The same.
        counts: Targets of the slice, for each tensor that may hold them.
    """

    whole: Mapping[str, float] = field(default_factory=dict)
    part: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LogRules:
    """How values of slices make that of the whole, for one kind of step.

    Attributes:
        rules: By the name of the value.
        targets: Tensors that the loss may be a mean over.
        unknown: Names without a rule.
    """

    rules: Mapping[str, str] = field(default_factory=dict)
    targets: frozenset[str] = frozenset()
    unknown: tuple[str, ...] = ()


def find_rules(ranks: Sequence[Logged], sp_size: int, tolerance: float, targets: frozenset[str]) -> LogRules:
    """The rules for values that all ranks logged.

    Args:
        ranks: Of the world; consecutive ones form a group.
        sp_size: P.
        tolerance: Relative error of a value.
        targets: Tensors that the loss may be a mean over.
    """
    groups = [ranks[first : first + sp_size] for first in range(0, len(ranks), sp_size)]
    candidates = set.intersection(*(set(rank.counts) for rank in ranks))
    # Those of the loss before other tensors, of which many may have as many targets.
    ordered = [*sorted(candidates, key=lambda count: (count not in targets, count == "tokens", count)), ADDED_UP]
    rules, unknown = {}, []
    for name in sorted(set.intersection(*(set(rank.whole) & set(rank.part) for rank in ranks))):
        fitting = [rule for rule in ordered if all(_fits(group, name, rule, tolerance) for group in groups)]
        if fitting:
            rules[name] = fitting[0]
        else:
            unknown.append(name)
    return LogRules(rules, targets, tuple(unknown))


def _fits(group: Sequence[Logged], name: str, rule: str, tolerance: float) -> bool:
    weights = [_weight(rank.counts, rule, sum(other.counts.get(rule, 0.0) for other in group)) for rank in group]
    found = sum(weight * rank.part[name] for weight, rank in zip(weights, group, strict=True) if weight)
    wanted = group[0].whole[name]
    return abs(found - wanted) <= tolerance * max(abs(wanted), 1e-6)


def _weight(counts: Mapping[str, float], rule: str, total: float) -> float:
    if rule == ADDED_UP:
        return 1.0
    return counts.get(rule, 0.0) / total if total else 0.0


def is_number(value: Any) -> bool:
    """Whether a logged value is one number, and not a metric."""
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)


def numbers_of(values: Mapping[str, Any]) -> dict[str, float]:
    """Those of logged values that are one number, without their graph."""
    return {name: float(torch.as_tensor(value).detach()) for name, value in values.items() if is_number(value)}


class LoggedValues:
    """Exchanges what a step logs, by one collective at its end.

    Args:
        mesh: Sizes and groups.
        device: The device of the collective.

    Attributes:
        of_kinds: The rules of each kind of step.
    """

    def __init__(self, mesh: SequenceMesh, device: torch.device) -> None:
        self._mesh = mesh
        self._device = device
        self.of_kinds: dict[str, LogRules] = {}
        self._told: set[str] = set()

    @contextmanager
    def exchanged(
        self, module: nn.Module, kind: str, local: LocalBatch, totals: Mapping[str, float], settled: str | None
    ) -> Iterator[None]:
        """Holds values with a rule back, exchanges them at the end and logs them. A collective if there are rules.

        Args:
            module: The user's LightningModule.
            kind: Of the step.
            local: Its batch, which is cut.
            totals: Targets of the group's batch.
            settled: The tensor that holds the targets, if it is known.
        """
        known, original = self.of_kinds.get(kind), getattr(module, "log", None)
        if known is None or original is None or self._mesh.sp_group is None:
            yield
            return
        held: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

        @eager
        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            if name in known.rules and is_number(value):
                held[name] = (value, args, kwargs)
            else:
                if is_number(value) and name not in (*known.unknown, *self._told):
                    self._tell(name, type(module).__name__)
                original(name, value, *args, **kwargs)

        own = vars(module).get("log")
        vars(module)["log"] = log
        try:
            yield
        finally:
            del vars(module)["log"]
            if own is not None:
                vars(module)["log"] = own
        if not known.rules:
            return
        given = {name: value for name, (value, _, _) in held.items()}
        values = self._exchange(known, given, local, totals, settled)
        for name, (_, args, kwargs) in held.items():
            original(name, values[name], *args, **kwargs)

    def _tell(self, name: str, module: str) -> None:
        self._told.add(name)
        if self._mesh.rank == 0:
            warnings.warn(
                f"{module} logs {name!r} where a trial of the step did not come, such as after the backward of manual "
                "optimization: each rank logs that of its slice. Log it before; split='blocks' in the strategy logs "
                "that of the whole sequence.",
                stacklevel=4,
            )

    def _exchange(
        self,
        known: LogRules,
        given: Mapping[str, Any],
        local: LocalBatch,
        totals: Mapping[str, float],
        settled: str | None,
    ) -> dict[str, Tensor]:
        # (2, names): weighted values and weights. The same names on all ranks, whichever of them a rank has logged.
        mine = torch.zeros(2, len(known.rules), dtype=torch.float64, device=self._device)
        for index, (name, rule) in enumerate(known.rules.items()):
            # Of tensors that fitted alike, the one that the loss turned out to be a mean over.
            rule = settled if settled is not None and {settled, rule} <= known.targets else rule
            weight = _weight(local.counts, rule, totals.get(rule, 0.0)) if name in given else 0.0
            if weight:
                value = torch.as_tensor(given[name], device=self._device).detach().double().squeeze()
                mine[0, index], mine[1, index] = value * weight, weight
        dist.all_reduce(mine, group=self._mesh.sp_group)
        found = {}
        for index, (name, rule) in enumerate(known.rules.items()):
            # A mean over those ranks that logged the value, where some did not.
            value = mine[0, index] if rule == ADDED_UP else mine[0, index] / mine[1, index].clamp_min(1e-30)
            found[name] = value.float()
        return found
