"""Names each kernel that computes attention on a GPU, once in a run, with the reason where it is a slow one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from lightning_ulysses.context import current_context


def _silent(text: str) -> None:
    pass


@dataclass
class KernelReport:
    """A note on a run.

    Attributes:
        say: Tells the user, on rank 0 only.
        said: What has been said.
    """

    say: Callable[[str], None] = _silent
    said: set[tuple[str, str]] = field(default_factory=set)


def note_kernel(q: Tensor, name: str, slow: str = "") -> None:
    """Says which kernel computes a call, if no earlier one went there for the same reason.

    Args:
        q: (B, H, S, D).
        name: Of the kernel.
        slow: Why it is none of the fast ones; empty for a fast one.
    """
    context = current_context()
    if context is None:
        return
    report = context.notes.of(KernelReport)
    if (name, slow) in report.said:
        return
    report.said.add((name, slow))
    because = f", which is slower than a fused one: {slow}" if slow else ""
    report.say(f"Attention runs on {name}{because}. First call: q {tuple(q.shape)} in {q.dtype}.")


def note_gathered(num_heads: int, ulysses: int, gather: int) -> None:
    """Says how ranks divide attention, once for each number of heads.

    Args:
        num_heads: H.
        ulysses: Ranks that exchange heads.
        gather: Ranks that gather keys and values.
    """
    context = current_context()
    if context is None:
        return
    report, key = context.notes.of(KernelReport), (f"{num_heads} heads", f"{ulysses}")
    if key not in report.said:
        report.said.add(key)
        exchanges = f"groups of {ulysses} exchange heads, and " if ulysses > 1 else ""
        report.say(
            f"Attention with H={num_heads} on P={ulysses * gather} ranks: {exchanges}keys and values are gathered over "
            f"{gather} {'groups' if ulysses > 1 else 'ranks'}."
        )
