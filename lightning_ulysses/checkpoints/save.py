"""Saves a sharded checkpoint so that it is complete at every moment at which it is there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lightning_ulysses.checkpoints.commit import flush_files, move, prepare, saving_name
from lightning_ulysses.checkpoints.manifest import Manifest, list_files, write
from lightning_ulysses.checkpoints.ranks import from_all, on_rank_zero, world
from lightning_ulysses.errors import UlyssesError

# Seconds until files that other nodes have written must be visible.
_PATIENCE = 30.0


@contextmanager
def saved_whole(path: Path, manifest: Manifest, is_first_of_node: bool) -> Iterator[Path]:
    """Around the writing of shards; every rank must enter it.

    Args:
        path: Where the checkpoint will be, the same on every rank.
        manifest: Without files.
        is_first_of_node: Whether this rank flushes the files of its node.

    Yields:
        The directory to write to.

    Raises:
        UlyssesError: On every rank, if rank 0 does not see the files of all ranks.
    """
    group, saving = world(), saving_name(path)
    on_rank_zero(lambda: prepare(path) and None, group)
    yield saving
    if is_first_of_node:
        flush_files(saving)
    # Also waits for every rank.
    listings = from_all(list_files(saving), group)
    on_rank_zero(lambda: _commit(path, manifest, listings), group)


def _commit(path: Path, manifest: Manifest, listings: list[dict[str, int]]) -> None:
    saving = saving_name(path)
    wanted = {name: size for listing in listings for name, size in listing.items()}
    deadline = time.monotonic() + _PATIENCE
    while (found := list_files(saving)) != wanted:
        if time.monotonic() > deadline:
            hidden = sorted(set(wanted) - set(found)) or sorted(n for n in wanted if wanted[n] != found[n])
            raise UlyssesError(
                f"a checkpoint of which rank 0 does not see {hidden[:4]}",
                "a directory that all processes share",
                f"save to a file system that all nodes have in common, instead of {str(path)!r}",
            )
        time.sleep(0.5)
    write(saving, replace(manifest, files=found, written=time.time()))
    move(path)
