"""The manifest of a checkpoint, written last: which files it has and of which run, step and division they are."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_ulysses.errors import UlyssesError

#: The file of the manifest in the directory that it describes.
NAME = "ulysses_manifest.json"
_VERSION = 1


@dataclass(frozen=True)
class Division:
    """How the state of the optimizer is divided over files.

    Args:
        world: W, the processes that wrote it.
        stage: ZeRO stage.
        precision: That of the engine: ``"32"``, ``"bf16"`` or ``"16"``.
        layout: Other settings of ZeRO by which the order of the numbers in a file depends.
    """

    world: int
    stage: int
    precision: str
    layout: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        more = "".join(f", {name}={value}" for name, value in sorted(self.layout.items()))
        return f"{self.world} processes, ZeRO stage {self.stage}, precision {self.precision}{more}"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is of.

    Args:
        run: Names the run, the same on all ranks.
        step: Optimizer steps taken.
        sp_size: P.
        optimizer: The class of the optimizer.
        division: How the state is divided.
        files: The size in bytes of each file, by its path within the directory.
        written: Seconds since 1970.
    """

    run: str
    step: int
    sp_size: int
    optimizer: str
    division: Division
    files: Mapping[str, int] = field(default_factory=dict)
    written: float = field(default_factory=time.time)


def list_files(folder: Path) -> dict[str, int]:
    """The size of each file below a directory, but for manifests."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != NAME:
            found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return found


def write(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest of a directory, whole or not at all."""
    beside = folder / f"{NAME}.{os.getpid()}"
    with open(beside, "w") as file:
        json.dump({"version": _VERSION, **asdict(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, folder / NAME)


def read(folder: Path) -> Manifest | None:
    """The manifest of a directory; None if it has none.

    Raises:
        UlyssesError: For one that cannot be read.
    """
    try:
        values = json.loads((folder / NAME).read_text())
        division = Division(**values.pop("division"))
        if values.pop("version") > _VERSION:
            raise ValueError("it is of a newer version of this package")
        return Manifest(division=division, **values)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UlyssesError(
            f"{folder / NAME}, which cannot be read ({error})",
            "the manifest that was written with the checkpoint",
            "resume from another checkpoint",
        ) from error


def lacking(folder: Path, manifest: Manifest) -> str | None:
    """The first file that is missing or has another size, in words; None if all are there."""
    for name, size in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def is_complete(folder: str | Path) -> bool:
    """Whether a directory has a manifest and all the files that it names."""
    try:
        manifest = read(Path(folder))
    except UlyssesError:
        return False
    return manifest is not None and lacking(Path(folder), manifest) is None


def newest_complete(folder: str | Path, run: str | None = None) -> str | None:
    """The checkpoint in a folder that was written last, of those that are complete; None if there is none.

    Args:
        folder: As given to ``ModelCheckpoint(dirpath=...)``.
        run: Only those of a run, which goes on under its name when it is resumed.

    Example:
        >>> trainer.fit(module, data, ckpt_path=newest_complete("checkpoints"))
    """
    written = {}
    for path in sorted(Path(folder).glob("*")):
        manifest = read(path) if is_complete(path) else None
        if manifest is not None and run in (None, manifest.run):
            written[str(path)] = manifest.written
    return max(written, key=lambda path: written[path]) if written else None
