"""What torch's graph of a computation holds."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

from torch import Tensor


def leaves_of(output: Tensor) -> Iterator[Tensor]:
    """The leaves that a gradient of ``output`` reaches."""
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # Nodes that add up a leaf's gradient hold it.
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            yield leaf
        nodes += [following for following, _ in node.next_functions]


def reached(output: Tensor, stops: Container[Any]) -> set[Any]:
    """The nodes among ``stops`` that ``output`` depends on, without going on behind them."""
    nodes, seen, found = [output.grad_fn], set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in stops:
            found.add(node)
        else:
            nodes += [following for following, _ in node.next_functions]
    return found
