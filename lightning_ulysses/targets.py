"""Which tensor of a batch the module's loss is a mean over, learnt from the losses that it computes.

A batch often offers more than one: ``labels`` and ``shift_labels`` differ by one target per row and rank. A weight from
the wrong one would train almost, but not quite, right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.graphs import eager
from lightning_ulysses.handle import Handle
from lightning_ulysses.state import LiveBatch, SequenceState, TargetEvidence

_NO, _UNKNOWN, _COUNT, _CONTENT = range(4)
_SETTLE_AFTER = 3
# What a module shifts by itself.
_HIDDEN = ("shift_input_ids", "shift_batch")
# Such a mean divides by the weights of its targets, not by their number.
_CLASS_WEIGHTS = "class weights"
_LABELS_OF = {"loss_mask": ("labels", "shift_labels"), "shift_loss_mask": ("shift_labels",)}


def install(state: SequenceState) -> Handle:
    """Notes the targets of cross entropies computed in a step, while it is open which tensor holds them."""
    original = torch.nn.functional.cross_entropy

    @functools.wraps(original)
    def cross_entropy(input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Where a plan joins the sequence, the loss comes behind the region in which the batch is live.
        batch = state.running
        if batch is not None and state.collect_evidence and not state.probing and not target.is_floating_point():
            _note(batch, target, *args, **kwargs)
        return original(input, target, *args, **kwargs)

    handle = Handle()
    functional: Any = torch.nn.functional
    handle.patch(functional, "cross_entropy", cross_entropy)
    return handle


@eager
def _note(batch: LiveBatch, target: Tensor, *args: Any, **kwargs: Any) -> None:
    """Keeps what a cross entropy was computed on; the further arguments are those of ``cross_entropy``."""
    if type(target).__module__.startswith("torch._subclasses"):
        # A compiler that traces a graph calls by name what is in it.
        return
    # Positional order behind the target: weight, size_average, ignore_index, reduce, reduction
    ignore_index = kwargs.get("ignore_index", args[2] if len(args) > 2 else -100)
    reduction = kwargs.get("reduction", args[4] if len(args) > 4 else "mean")
    weight = kwargs.get("weight", args[0] if args else None)
    name = _CLASS_WEIGHTS if weight is not None and reduction == "mean" else None
    batch.evidence.append(TargetEvidence(target.detach(), ignore_index, reduction == "mean", name))


def _explains(name: str, evidence: TargetEvidence, live: LiveBatch) -> int:
    """How well the tensor ``name`` explains a mean over the targets of ``evidence``."""
    assert evidence.target is not None
    if float((evidence.target != evidence.ignore_index).sum()) != live.seen[name]:
        return _NO
    shard = live.shards.get(name)
    if shard is None or shard.numel() != evidence.target.numel():
        return _COUNT
    aligned = shard.reshape(-1).to(evidence.target.device)
    return _CONTENT if torch.equal(aligned, evidence.target.reshape(-1).to(aligned.dtype)) else _COUNT


def _score(name: str, evidence: TargetEvidence, live: LiveBatch) -> int:
    """How well one candidate explains one loss."""
    if evidence.name is not None:
        return _CONTENT if evidence.name == name else _NO
    if evidence.is_mean:
        return _explains(name, evidence, live)
    # The module takes the mean itself; which labels it used tells which mask belongs to them.
    if name in _LABELS_OF:
        labels = next((label for label in _LABELS_OF[name] if label in live.seen), None)
        return _UNKNOWN if labels is None else max(_UNKNOWN, _explains(labels, evidence, live))
    if name in _HIDDEN or any(mask in live.counts for mask in _LABELS_OF):
        return _NO
    if name == "tokens":
        # Where the module masks its targets by hand, the cross entropy itself may well be over all tokens.
        return min(_UNKNOWN, _explains(name, evidence, live))
    return max(_UNKNOWN, _explains(name, evidence, live))


class TargetResolver:
    """Settles, on all ranks alike, the name of the tensor that the loss is a mean over.

    Args:
        explicit: The user's answer, if any.
        agree: Reduces a small int64 tensor to its minimum over all ranks.
    """

    def __init__(self, explicit: str | None, agree: Callable[[Tensor], Tensor]) -> None:
        self.explicit = explicit
        self._agree = agree
        self._settled: str | None = None
        self._attempts = 0

    @property
    def is_settled(self) -> bool:
        """Whether evidence need not be collected any more."""
        return self._settled is not None or self.explicit is not None

    def resolve(self, live: LiveBatch) -> str:
        """The name to weight by; a collective until it is settled.

        Args:
            live: The batch of the step, with the evidence collected.

        Raises:
            UlyssesError: On every rank, if no candidate or no single one explains the loss.
        """
        if self.explicit is not None:
            return self._explicit_name(live)
        if self._settled is not None and self._settled in live.counts:
            return self._settled
        names = sorted(live.counts)
        if not names:
            raise self._uncountable(live)
        scores = [
            min((_score(name, e, live) for e in live.evidence), default=_NO if name in _HIDDEN else _UNKNOWN)
            for name in names
        ]
        all_equal = len({count for name, count in live.counts.items() if name != "tokens"}) <= 1
        *scores, all_equal = self._agree(torch.tensor([*scores, all_equal], dtype=torch.int64)).tolist()
        best = max(scores)
        chosen = [name for name, score in zip(names, scores, strict=True) if score == best]
        if best == _NO:
            raise self._unexplained(live)
        if best == _UNKNOWN:
            chosen = [name for name in chosen if name != "tokens"] or chosen
        if len(chosen) > 1 and not all_equal:
            raise self._ambiguous(chosen, live)
        self._attempts += 1
        if len(chosen) == 1 and (best == _CONTENT or self._attempts >= _SETTLE_AFTER):
            self._settled = chosen[0]
        return chosen[0]

    def _explicit_name(self, live: LiveBatch) -> str:
        assert self.explicit is not None
        if self.explicit not in live.counts:
            raise UlyssesError(
                f"targets={self.explicit!r}",
                f"one of {sorted(live.counts)}, the tensors of this batch that may hold targets",
                "change targets in the strategy",
            )
        return self.explicit

    @staticmethod
    def _unexplained(live: LiveBatch) -> UlyssesError:
        seen = [
            f"{int((e.target != e.ignore_index).sum())} targets (ignore_index={e.ignore_index})"
            + (f" with {_CLASS_WEIGHTS}" if e.name == _CLASS_WEIGHTS else "")
            for e in live.evidence
            if e.target is not None
        ]
        return UlyssesError(
            f"a loss over {', '.join(seen) or 'targets of its own'} on some rank, while this rank's slice has "
            f"{live.seen} valid targets",
            "a mean over the targets of one tensor of the batch",
            "use batch['shift_labels'] instead of shifting inside the step, set ignore_index or targets in the "
            "strategy, or set loss_weighting='none' if the loss is no mean over tokens",
        )

    @staticmethod
    def _uncountable(live: LiveBatch) -> UlyssesError:
        return UlyssesError(
            f"a batch padded by {live.layout.num_padding} tokens, none of whose tensors can hold the targets",
            "integer labels or a loss_mask, in which padding can be marked to be ignored",
            "leave pad_to_multiple_of out; no multiple is required",
        )

    @staticmethod
    def _ambiguous(chosen: list[str], live: LiveBatch) -> UlyssesError:
        return UlyssesError(
            f"a loss that could be a mean over any of {chosen}, with {live.counts} targets on this rank",
            "to know which of them the loss is a mean over",
            f"set targets={chosen[-1]!r} (or another of them) in the strategy",
        )
