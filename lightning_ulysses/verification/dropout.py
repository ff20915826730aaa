"""Switches dropout of attention off in both runs: each rank draws for its own heads, other than one process would."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

_NAMES = ("dropout", "pdrop", "drop_path", "layerdrop")


def _probability(value: Any) -> bool:
    return isinstance(value, float) and 0.0 < value <= 1.0


def silence_attention(root: nn.Module) -> list[str]:
    """Sets dropout probabilities below ``root`` to 0 that attention may use.

    Those are numbers that modules or their configurations hold, and dropout layers inside of attention. Other dropout
    layers draw as in one process.

    Returns:
        A note that names them, if there were any.
    """
    found: list[str] = []
    for name, module in root.named_modules():
        if isinstance(module, _DropoutNd) and module.p > 0 and "att" in name.lower():
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
