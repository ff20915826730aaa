"""Writes a directory beside its place and moves it there when it is complete, so that no moment shows half of it.

A checkpoint ``last.ckpt`` is written as ``last.saving.ckpt``. Where directories cannot be exchanged in one step, the
one that is replaced is ``last.former.ckpt`` for a moment. At every moment one of the three is complete, if one was.
Lightning's search for ``ckpt_path="last"`` finds all three names.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

from lightning_ulysses.checkpoints.manifest import is_complete, read

# Linux: of the directory that paths are relative to, and of the exchange (``man 2 renameat2``).
_HERE = -100
_EXCHANGE = 2

# The end of the name of what is being deleted. What a killed process left of it goes with the next save.
_REMOVING = ".removing"


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.stem}.{what}{path.suffix}")


def saving_name(path: Path) -> Path:
    """Where a directory is written before it is moved to ``path``."""
    return _beside(path, "saving")


def former_name(path: Path) -> Path:
    """Where the directory that is replaced may be for a moment."""
    return _beside(path, "former")


def prepare(path: Path) -> Path:
    """Settles what a killed process left, and returns the place to write to, which does not exist.

    A complete directory that was not moved yet takes its place, before anything is deleted.
    """
    saving, former = saving_name(path), former_name(path)
    if _written(saving) > _written(path):
        move(path)
    elif not os.path.lexists(path) and is_complete(former):
        os.rename(former, path)
    for left in (saving, former, *path.parent.glob(f".*{_REMOVING}")):
        if left.exists():
            shutil.rmtree(left)
    return saving


def _written(path: Path) -> float:
    """When a complete directory was written; a time before all others if it is not complete."""
    manifest = read(path) if is_complete(path) else None
    return manifest.written if manifest is not None else float("-inf")


def move(path: Path) -> None:
    """Moves what was written for ``path`` to its place. What was there is deleted."""
    saving, former = saving_name(path), former_name(path)
    if not os.path.lexists(path):
        os.rename(saving, path)
    elif path.is_symlink() or path.is_file():
        # Lightning's link to another checkpoint.
        path.unlink()
        os.rename(saving, path)
    elif _exchange(saving, path):
        shutil.rmtree(saving)
    else:
        if former.exists():
            shutil.rmtree(former)
        os.rename(path, former)
        os.rename(saving, path)
        shutil.rmtree(former)
    _flush_folder(path.parent)


def discard(path: Path) -> None:
    """Deletes a checkpoint. It loses its name first, so that half of it is never found under it."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        # Not a name that Lightning takes for a last checkpoint.
        away = path.with_name(f".{path.name}{_REMOVING}")
        if away.exists():
            shutil.rmtree(away)
        os.rename(path, away)
        shutil.rmtree(away)


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges two directories in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return bool(rename(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0)


def flush_files(folder: Path) -> None:
    """Has the system write the files of a directory to the disk, so that they survive the end of the machine."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        # Some file systems cannot.
        pass
    finally:
        os.close(handle)
