"""Whether the data of a resumed epoch are those that it began with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.agreement import digest, fingerprint, raise_on_all

# Elements of a tensor that count.
_MOST = 4096
# Digests that are kept: of the batches that a dataloader may have loaded ahead of the last step.
_KEPT = 256


def settings_of(loader: Any) -> dict[str, Any]:
    """What of a dataloader must stay the same within an epoch, by the names under which users know it."""
    dataset, sampler = getattr(loader, "dataset", None), getattr(loader, "sampler", None)
    batches = getattr(loader, "batch_sampler", None)
    found: dict[str, Any] = {
        "dataset": type(dataset).__name__,
        "length": _length(dataset),
        "batch_size": getattr(loader, "batch_size", None) or getattr(batches, "batch_size", None),
        "drop_last": bool(getattr(loader, "drop_last", False)),
        "sampler": type(sampler).__name__ if sampler is not None else None,
        # Of a sampler that deals one order to all ranks.
        "seed": getattr(sampler, "seed", None) if getattr(sampler, "shuffle", True) else None,
        # Datasets of Hugging Face name their content.
        "fingerprint": getattr(dataset, "_fingerprint", None),
    }
    settings = getattr(dataset, "resume_settings", None)
    return found | (dict(settings) if isinstance(settings, Mapping) else {})


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except Exception:
        return None


def _leaves(batch: Any) -> Iterator[object]:
    if isinstance(batch, Tensor):
        values = [batch] if batch.layout == torch.strided and not batch.is_quantized else []
        yield tuple(batch.shape), str(batch.dtype), fingerprint(values, _MOST)
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield str(key)
            yield from _leaves(value)
    elif isinstance(batch, (tuple, list)):
        yield len(batch)
        for value in batch:
            yield from _leaves(value)
    else:
        yield batch if isinstance(batch, (str, int, float, bool)) else type(batch).__name__


def _digest(batch: Any) -> int:
    return digest(*_leaves(batch))


class Trail:
    """Remembers the last batches of an epoch, to recognise them when a resumed run loads them again.

    Args:
        loader: The dataloader.
        dp_rank: Whose batches these are.
    """

    def __init__(self, loader: Any, dp_rank: int) -> None:
        self._loader = loader
        self._dp_rank = dp_rank
        self._digests: dict[int, int] = {}
        self._wanted: tuple[int, int | None] | None = None

    def begin(self) -> None:
        """Begins an epoch."""
        self._digests.clear()

    def add(self, number: int, batch: Any) -> None:
        """Notes a batch, by its number within the epoch."""
        self._digests[number] = _digest(batch)
        # The first one is kept.
        if number > _KEPT:
            self._digests.pop(number - _KEPT, None)

    def state_dict(self, used: int) -> dict[str, Any]:
        """What `load_state_dict` compares, after a number of batches of the epoch, for this data-parallel rank."""
        return {"settings": settings_of(self._loader), "digest": self._digests.get(used - 1)}

    def load_state_dict(self, state: Mapping[str, Any], dp_size: int) -> None:
        """Compares the settings of the dataloader, and has `check` compare its batches; a collective.

        Args:
            state: With ``batches``, ``dp_size``, and as ``shares`` the `state_dict` of each data-parallel rank.
            dp_size: Data-parallel ranks now.

        Raises:
            UlyssesError: On every rank, with the settings that differ on some rank.
        """
        shares = state.get("shares")
        if not shares:
            return
        is_same_share = state["dp_size"] == dp_size
        share = shares[self._dp_rank if is_same_share else 0]
        saved, now = share["settings"], settings_of(self._loader)
        if not is_same_share and _whole(saved, state["dp_size"]) == _whole(now, dp_size):
            # Divided over ranks by the user: each has a dataset of its own.
            saved = {**saved, "length": now["length"], "fingerprint": now["fingerprint"]}
        names = list(dict.fromkeys(name for name in (*saved, *now) if saved.get(name) != now.get(name)))
        raise_on_all(_other_settings(saved, now, names) if names else None)
        if is_same_share:
            self._wanted = state["batches"], share["digest"]
        elif str(now["sampler"]).endswith("RandomSampler"):
            raise UlyssesError(
                f"a checkpoint in the middle of an epoch of {state['dp_size']} data-parallel ranks, each of which drew "
                f"an order of its own with a {now['sampler']}, resumed with {dp_size}",
                "one order that is dealt to all ranks, so that no sample is lost or used twice",
                "leave use_distributed_sampler at True, resume with the former number of data-parallel ranks, or from "
                "a checkpoint taken at the end of an epoch",
            )

    def check(self, used: int, again: Callable[[], Iterator[Any]]) -> None:
        """Compares the last batch that was loaded again with that of the run that saved; a collective.

        Args:
            used: Batches that were loaded again.
            again: Loads the epoch once more, to see whether that gives the same batches.

        Raises:
            UlyssesError: On every rank, if the data of some rank are others.
        """
        wanted, self._wanted = self._wanted, None
        if wanted is not None and wanted[0] == used:
            raise_on_all(self._problem(*wanted, again))

    def _problem(self, used: int, wanted: int | None, again: Callable[[], Iterator[Any]]) -> UlyssesError | None:
        if wanted is None or self._digests.get(used - 1) == wanted:
            return None
        first = next(again(), None)
        if first is None or used == 0 or _digest(first) == self._digests.get(0):
            return UlyssesError(
                f"a checkpoint in the middle of an epoch, batch {used - 1} of which is now another one",
                "the same data until the end of the epoch, so that no sample is lost or used twice",
                "resume with the former data and order, or from a checkpoint taken at the end of an epoch",
            )
        warnings.warn(
            "The dataset draws numbers that no seed decides: the batches of the resumed epoch are others.", stacklevel=3
        )
        return None


def _other_settings(saved: Mapping[str, Any], now: Mapping[str, Any], names: list[str]) -> UlyssesError:
    return UlyssesError(
        f"a checkpoint in the middle of an epoch of {_named(saved, names)}, resumed with {_named(now, names)}",
        "the same dataset and dataloader until the end of the epoch, so that no sample is lost or used twice",
        "resume with the former data, or from a checkpoint taken at the end of an epoch",
    )


def _whole(settings: Mapping[str, Any], dp_size: int) -> int:
    return (settings.get("length") or 0) * dp_size


def _named(settings: Mapping[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name}={settings.get(name)!r}" for name in names)
