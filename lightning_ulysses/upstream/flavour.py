"""Refuses ``pytorch_lightning``, which does not mix with ``lightning``, and names the import to change."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

from lightning_ulysses.errors import UlyssesError

_OTHER = "pytorch_lightning.strategies"


def _refuse(name: str) -> NoReturn:
    raise UlyssesError(
        f"strategy={name!r} in a Trainer of pytorch_lightning",
        "a Trainer of the lightning package, whose classes are other ones although their names are the same",
        "replace `import pytorch_lightning as pl` by `import lightning.pytorch as pl` everywhere",
    )


def _fill(strategies: ModuleType, names: Iterable[str]) -> None:
    for name in names:
        strategies.StrategyRegistry.register(
            name, partial(_refuse, name), description="needs `import lightning`", override=True
        )


class _Waiting(MetaPathFinder):
    """Fills the other package's registry as soon as that package is imported, and then removes itself."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The other finders' spec, with a loader that also fills the registry; None for any other module."""
        if fullname != _OTHER:
            return None
        found = (finder.find_spec(fullname, path, target) for finder in list(sys.meta_path) if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _fill(module, self._names)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_refusals(names: Iterable[str]) -> None:
    """Makes ``pytorch_lightning.Trainer(strategy=name)`` fail with the import to use, now or once it is imported."""
    if _OTHER in sys.modules:
        _fill(sys.modules[_OTHER], names)
    else:
        sys.meta_path.insert(0, _Waiting(tuple(names)))
