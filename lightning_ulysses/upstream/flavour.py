"""Lightning comes as two packages that do not mix; here users of the other one learn which import to change."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial
from typing import NoReturn

from lightning_ulysses.errors import UlyssesError


def _refuse(name: str) -> NoReturn:
    raise UlyssesError(
        f"strategy={name!r} in a Trainer of pytorch_lightning",
        "a Trainer of the lightning package, whose classes are other ones although their names are the same",
        "replace `import pytorch_lightning as pl` by `import lightning.pytorch as pl` everywhere",
    )


def register_refusals(names: Iterable[str]) -> None:
    """Makes ``pytorch_lightning.Trainer(strategy=name)`` say what to import instead, if that is imported already."""
    strategies = sys.modules.get("pytorch_lightning.strategies")
    if strategies is None:
        return
    for name in names:
        strategies.StrategyRegistry.register(
            name, partial(_refuse, name), description="needs `import lightning`", override=True
        )
