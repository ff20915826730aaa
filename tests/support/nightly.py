"""Long sweeps: `make test` runs a sample of them, `make nightly` all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[Any], every: int, keep: Iterable[Any] = ()) -> list[Any]:
    """Cases for ``parametrize``, of which those outside of the sample are marked ``nightly``.

    Args:
        cases: All of them.
        every: One in so many is in the sample, beginning with the first.
        keep: Cases that are in the sample as well.
    """
    kept = list(keep)
    return [
        case if place % every == 0 or case in kept else pytest.param(case, marks=pytest.mark.nightly)
        for place, case in enumerate(cases)
    ]


def mostly(cases: Iterable[Any], seldom: Iterable[Any]) -> list[Any]:
    """Cases for ``parametrize``, of which some repeat what others prove and are marked ``nightly``.

    Args:
        cases: All of them; tuples are values of several arguments.
        seldom: Those that are marked.
    """
    every, marked = list(cases), list(seldom)
    unknown = [case for case in marked if case not in every]
    assert not unknown, f"{unknown} are not among the cases"
    return [_nightly(case) if case in marked else case for case in every]


def _nightly(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.nightly)
