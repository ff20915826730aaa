"""What was measured before, so that a plan that is asked for again is there at once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.planning.lab import Lab, Rehearsal, Scene
from lightning_ulysses.planning.models import Facts, Made, Source
from lightning_ulysses.progress import unseen


def folder() -> Path:
    """Where measurements are kept: ``lightning_ulysses`` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_ulysses"


def _stamp() -> str:
    """Changes with the package and with torch."""
    root = Path(__file__).parents[1]
    files = sorted(root.rglob("*.py"))
    stats = [(str(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr((torch.__version__, stats)).encode()).hexdigest()


class Measurements:
    """Facts and rehearsals of one model, from a file where they are known.

    Args:
        source: The model.
        place: The folder of the files; None to keep nothing.
        advance: Told of each measurement.
    """

    def __init__(self, source: Source, place: Path | None, advance: Callable[[int], object] = unseen) -> None:
        self._source = source
        self._advance = advance
        self._made: Made | None = None
        self._lab: Lab | None = None
        name = hashlib.sha256(f"{_stamp()} {source.key}".encode()).hexdigest()
        self._path = None if place is None else place / f"plan-{name[:32]}.json"
        self._known: dict[str, Any] = {}
        if self._path is not None:
            # An unreadable file is written anew.
            with contextlib.suppress(OSError, ValueError):
                self._known = json.loads(self._path.read_text())

    @property
    def facts(self) -> Facts:
        """Sizes of the model."""
        found = self._remember("facts", lambda: asdict(self._load().facts))
        return Facts(**{each.name: found[each.name] for each in fields(Facts)})

    def rehearsal(self, scene: Scene) -> Rehearsal:
        """The rehearsal of a step, without what lived at the peak."""
        return Rehearsal(**self._remember(repr(scene), lambda: asdict(replace(self._rehearse(scene), held=[]))))

    def _load(self) -> Made:
        if self._made is None:
            self._made = self._source.load()
        return self._made

    def _rehearse(self, scene: Scene) -> Rehearsal:
        if self._lab is None:
            made = self._load()
            self._lab = Lab(made.make, made.step)
        try:
            return self._lab.rehearse(scene)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UlyssesError(
                f"a plan for {self.facts.name}, whose step reads values of tensors ({error})",
                "a model whose shapes follow from those of its inputs; experts that sort their tokens do not",
                "plan a dense model with the same sizes: what waits for the backward is the same under checkpoints",
            ) from error

    def _remember(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in self._known:
            self._known[key] = measure()
            self._advance(1)
            self._write()
        found: dict[str, Any] = self._known[key]
        return found

    def _write(self) -> None:
        if self._path is None:
            return
        # A folder that cannot be written to costs time, and nothing else.
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            other = self._path.with_suffix(f".{os.getpid()}")
            other.write_text(json.dumps(self._known))
            other.replace(self._path)
