"""Converts a checkpoint once for any number of processes, any ZeRO stage and any precision."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

from lightning_ulysses.checkpoints.manifest import Division, Manifest, is_complete, lacking, list_files, read, write
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.progress import tracked
from lightning_ulysses.upstream import shards, universal

#: The folder of the converted state, and the name under which DeepSpeed finds it.
UNIVERSAL = "universal"


def is_converted(path: Path) -> bool:
    """Whether a directory holds a complete conversion, of the very checkpoint that is there if there is one."""
    target = path / UNIVERSAL
    manifest = read(path)
    return is_complete(target) and (manifest is None or _is_of(target, manifest))


def _is_of(target: Path, manifest: Manifest) -> bool:
    """Whether a conversion has the manifest of a checkpoint, apart from its files."""
    found = read(target)
    return found is not None and replace(found, files=manifest.files) == manifest


def division_of(path: Path) -> Division:
    """How a checkpoint without a manifest is divided, read from its shards."""
    try:
        return Division(*shards.described(path / "checkpoint"))
    except (FileNotFoundError, KeyError) as error:
        raise UlyssesError(
            f"{str(path)!r}, whose shards cannot be read ({error!r})",
            "a checkpoint of this strategy with the state of its optimizer",
            "resume from another checkpoint",
        ) from error


def convert(path: Path, output: Path) -> Path:
    """Writes the state of a checkpoint to ``output/universal``, in DeepSpeed's universal format.

    One of the same checkpoint that is there and complete is left as it is.

    Args:
        path: The checkpoint.
        output: Its own directory, to be found when it is resumed from, or another one, to be passed as ``ckpt_path``.

    Raises:
        UlyssesError: If the checkpoint is incomplete, or ``output`` cannot be written to.
    """
    target = output / UNIVERSAL
    # A checkpoint without a manifest has a time of its own as well.
    manifest = read(path) or Manifest("", 0, 0, "", division_of(path), written=(path / "checkpoint").stat().st_mtime)
    if is_complete(target) and _is_of(target, manifest):
        return target
    problem = lacking(path, manifest)
    if problem is not None:
        raise UlyssesError(f"the incomplete checkpoint {str(path)!r}: {problem}", "a complete one", "take another one")
    beside = output / f"{UNIVERSAL}.converting"
    try:
        for left in (beside, target):
            if left.exists():
                shutil.rmtree(left)
        beside.mkdir(parents=True)
        universal.write_universal(
            path / "checkpoint", beside, partial(tracked, text="Converting the checkpoint", unit="parameters")
        )
        write(beside, replace(manifest, files=list_files(beside)))
        os.rename(beside, target)
        (output / "latest_universal").write_text(UNIVERSAL)
    except OSError as error:
        raise UlyssesError(
            f"{str(output)!r}, to which the converted checkpoint cannot be written ({error})",
            "a directory with room for it, about the size of the checkpoint",
            f"convert by hand, `lightning-ulysses convert {path} --output DIR`, and pass ckpt_path=DIR",
        ) from error
    return target
