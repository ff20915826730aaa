"""Which checkpoint is loaded, and how: by DeepSpeed as it is, or converted for another division of the state."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lightning_ulysses.checkpoints.commit import former_name, saving_name
from lightning_ulysses.checkpoints.convert import UNIVERSAL, convert, division_of, is_converted
from lightning_ulysses.checkpoints.manifest import NAME, Division, Manifest, is_complete, lacking, newest_complete, read
from lightning_ulysses.checkpoints.ranks import from_all, on_rank_zero, patient_group, world
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.export import load_weights
from lightning_ulysses.upstream import shards, universal
from lightning_ulysses.upstream.deepspeed import held_frozen

# Optimizers with the same state.
_ALIKE = ({"Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"}, {"Lion", "FusedLion", "DeepSpeedCPULion"})


@dataclass(frozen=True)
class Found:
    """A checkpoint to load.

    Args:
        path: Its directory.
        manifest: None if it was saved without one.
        division: How its state is divided.
    """

    path: Path
    manifest: Manifest | None
    division: Division

    @property
    def run(self) -> str:
        """The run that saved it; empty if that is not known."""
        return self.manifest.run if self.manifest is not None else ""

    @property
    def manifest_folder(self) -> Path:
        """The directory that the manifest is about."""
        return self.path / UNIVERSAL if self.is_universal else self.path

    @property
    def is_universal(self) -> bool:
        """Whether it was converted into a directory of its own, and has no shards."""
        return not (self.path / "checkpoint").is_dir()


def _is_last(path: Path) -> bool:
    # The names among which Lightning chooses for ``ckpt_path="last"``.
    return path.suffix == ".ckpt" and path.name.startswith("last")


def _is_beside(path: Path) -> bool:
    # The names of `checkpoints.commit`.
    return path.stem.endswith((".saving", ".former"))


def find(path: str | Path) -> Found:
    """The checkpoint at a path, if it is complete, the same on every rank; a collective.

    Lightning's ``ckpt_path="last"`` may name an incomplete directory, where a process was killed while it saved, or
    one that is older than a complete one of the same run. The newest complete one takes its place.

    Args:
        path: A directory.

    Raises:
        UlyssesError: On every rank, for an incomplete checkpoint, or if ranks see different ones.
    """
    group = world()
    found = on_rank_zero(lambda: _choose(Path(path)), group)
    seen = from_all(_seen(found), group)
    for rank, what in enumerate(seen):
        if what is not None:
            raise UlyssesError(
                f"the checkpoint {str(found.path)!r}, of which rank {rank} sees that {what}",
                "the same files on every rank",
                "put the checkpoint on a file system that all nodes have in common",
            )
    return found


def _seen(found: Found) -> str | None:
    if found.manifest is None:
        return None if found.path.is_dir() else "it is missing"
    if read(found.manifest_folder) != found.manifest:
        return f"{NAME} is another one"
    return lacking(found.manifest_folder, found.manifest)


def _choose(path: Path) -> Found:
    if not path.exists():
        # Killed between two moves.
        for left in (saving_name(path), former_name(path)):
            if left.exists() and (manifest := read(left)) is not None and lacking(left, manifest) is None:
                return Found(left, manifest, manifest.division)
    if is_converted(path) and not (path / "checkpoint").is_dir():
        manifest = read(path / UNIVERSAL)
        assert manifest is not None
        return Found(path, manifest, manifest.division)
    if not (path.is_dir() and _is_beside(path)):
        _check_directory(path)
    manifest, problem = _complete(path)
    if _is_last(path) and (manifest is not None or problem is not None):
        run = manifest.run if manifest is not None else None
        newest = Path(newest_complete(path.parent, run) or path)
        if not os.path.samefile(newest, path) and is_complete(newest):
            why = f"{path} is incomplete ({problem})" if problem is not None else f"{path} is not the newest one"
            warnings.warn(f"{why}. Instead, {newest} is resumed from.", stacklevel=2)
            path, (manifest, problem) = newest, _complete(newest)
    if problem is not None:
        raise _incomplete(path, problem, newest_complete(path.parent))
    if manifest is None:
        warnings.warn(
            f"{path} has no {NAME}, as checkpoints of earlier versions. Whether it is complete cannot be told.",
            stacklevel=2,
        )
        return Found(path, None, division_of(path))
    return Found(path, manifest, manifest.division)


def _complete(path: Path) -> tuple[Manifest | None, str | None]:
    """The manifest of a directory, and what is wrong with the directory."""
    try:
        manifest = read(path)
    except UlyssesError as error:
        return None, error.got
    if manifest is None:
        return None, "it was not written to its end" if _is_beside(path) else None
    return manifest, lacking(path, manifest)


def _check_directory(path: Path) -> None:
    if path.is_dir() and (path / "checkpoint").is_dir():
        return
    kind = "a single file" if path.is_file() else "which is no sharded checkpoint" if path.exists() else "not there"
    raise UlyssesError(
        f"the checkpoint {str(path)!r}, {kind}",
        "a directory that this strategy saved, with a folder 'checkpoint' inside",
        "pass the path that ModelCheckpoint or Trainer.save_checkpoint wrote; weights of a single file are loaded with "
        "module.load_state_dict(torch.load(path)['state_dict']) before fit, or with load_full_weights=True at stage 3",
    )


def _incomplete(path: Path, problem: str, other: str | None) -> UlyssesError:
    fix = f"resume from {other!r}, the newest complete one there" if other else "resume from another checkpoint"
    return UlyssesError(f"the incomplete checkpoint {str(path)!r}: {problem}", "all files of its manifest", fix)


def check_optimizer(found: Found, optimizer: str) -> None:
    """Refuses the state of another optimizer.

    Raises:
        UlyssesError: With both classes.
    """
    saved = found.manifest.optimizer if found.manifest is not None else ""
    # Unknown for a checkpoint without a manifest.
    if saved in ("", optimizer):
        return
    if any({saved, optimizer} <= kinds for kinds in _ALIKE):
        warnings.warn(f"The state of {saved} is continued by {optimizer}.", stacklevel=2)
        return
    raise UlyssesError(
        f"a checkpoint of the optimizer {saved} to resume with {optimizer}",
        "the optimizer whose state it holds",
        f"return {saved} from configure_optimizers, or begin anew from its weights, "
        f"module.load_state_dict(lightning_ulysses.export.load_weights({str(found.path)!r})), without ckpt_path",
    )


def load_to_train(
    found: Found, wanted: Division, engine: Any, natively: Callable[[Path], dict[str, Any]], say: Callable[[str], None]
) -> dict[str, Any]:
    """Loads weights and the optimizer's state into an engine that trains; a collective.

    Where this run divides them in another way, they are read from DeepSpeed's universal format. Rank 0 converts the
    checkpoint, unless that was done before.

    Args:
        found: The checkpoint.
        wanted: How this run divides its state.
        engine: DeepSpeed's.
        natively: Has DeepSpeed load a directory that is divided alike.
        say: Tells the user.

    Returns:
        What Lightning saved beside them.

    Raises:
        UlyssesError: If the state does not fit this run's optimizer.
    """
    check_optimizer(found, type(engine.optimizer.optimizer).__name__)
    if found.division == wanted and not found.is_universal:
        return _natively(found, engine.module, natively)
    if not found.is_universal and not on_rank_zero(lambda: is_converted(found.path), world()):
        say(f"{found.path} is of {found.division}. It is converted for {wanted}.")
        with patient_group() as group:
            on_rank_zero(lambda: convert(found.path, found.path), group)
    try:
        return universal.load_universal(engine, found.path / UNIVERSAL)
    except ValueError as error:
        raise UlyssesError(
            f"the checkpoint {str(found.path)!r} of {found.division}, resumed with {wanted}: {error}",
            "the parameters and the parameter groups that it was saved with, with the optimizer's state in memory",
            "resume with the former module and optimizer",
        ) from error


def _natively(found: Found, module: nn.Module, natively: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    names = shards.frozen_names(found.path / "checkpoint")
    with held_frozen(parameter for name, parameter in module.named_parameters() if name in names):
        return natively(found.path)


def load_to_evaluate(
    found: Found, wanted: Division, module: nn.Module, natively: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """Loads weights into a module that is only evaluated; a collective. See `load_to_train`."""
    is_partitioned = {found.division.stage == 3, wanted.stage == 3}
    is_same = is_partitioned == {False} or (is_partitioned == {True} and found.division.world == wanted.world)
    if is_same and not found.is_universal:
        return _natively(found, module, natively)
    if found.is_universal:
        tensors, state = universal.read_universal(found.path / UNIVERSAL)
    else:
        tensors, state = load_weights(found.path), shards.client_state(found.path / "checkpoint")
    universal.load_whole(module, tensors)
    return state
