"""Switches dropout off in both runs, since ranks draw other random numbers than one process would."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from lightning_ulysses.patching.handle import Handle

_NAMES = ("dropout", "pdrop", "drop_path", "layerdrop")


def _probability(value: Any) -> bool:
    return isinstance(value, float) and 0.0 < value <= 1.0


def silence_modules(root: nn.Module) -> list[str]:
    """Sets every dropout probability below ``root`` to 0.

    Returns:
        A note that names them, if there were any.
    """
    found: list[str] = []
    for name, module in root.named_modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            found.append(f"{name} (p={module.p:g})")
            module.p = 0.0
        for holder, where in ((module, name), (getattr(module, "config", None), f"{name}.config")):
            for attribute, value in list(vars(holder).items()) if hasattr(holder, "__dict__") else []:
                if _probability(value) and any(part in attribute for part in _NAMES):
                    found.append(f"{where}.{attribute}={value:g}".lstrip("."))
                    setattr(holder, attribute, 0.0)
    if not found:
        return []
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    return [f"dropout on, switched off for the comparison: {', '.join(found[:4])}{more}"]


@contextmanager
def dropout_off(notes: list[str]) -> Iterator[None]:
    """Makes ``torch.nn.functional.dropout`` return its input, and notes every call that would have dropped."""
    original = torch.nn.functional.dropout

    @functools.wraps(original)
    def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        note = f"dropout on, switched off for the comparison: torch.nn.functional.dropout(p={p:g})"
        if training and p > 0 and note not in notes:
            notes.append(note)
        return input

    handle = Handle()
    functional: Any = torch.nn.functional
    handle.patch(functional, "dropout", dropout)
    try:
        yield
    finally:
        handle.remove()
