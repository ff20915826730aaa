"""Architectures of transformers, built tiny: one step is that of one process, as docs/architectures.md says."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from typing import Any
from unittest import mock

import pytest
from every import BOUND, LINES, PAGE, fit_and_listen, page, tried
from nightly import sampled
from tiny import KINDS, Tiny, architectures, tiny

from lightning_ulysses.testing import compare, fit_single
from lightning_ulysses.testing.processes import ProcessPool

ROWS = [json.loads(line) for line in LINES.read_text().splitlines()]


@pytest.mark.parametrize("name", sampled([row["type"] for row in ROWS if row["result"] == "exact"], 40))
def test_one_step(pool: ProcessPool, name: str) -> None:
    row = tried(pool, name, *architectures()[name])
    assert row["result"] == "exact", row


# One of each kind: a mask made from a slice, sequences padded inside, more tokens in the decoder than it was given,
# positions counted from 0 in what is joined, eager attention with a position bias.
JOINED = ("deepseek_v32", "longformer", "prophetnet", "roformer", "switch_transformers")


@pytest.mark.parametrize("name", JOINED)
def test_kinds_of_joined_submodules(pool: ProcessPool, name: str) -> None:
    row = tried(pool, name, *architectures()[name])
    assert row["result"] == "exact", row


def first(found: Iterable[Any]) -> Any:
    return next(iter(found), None)


def fit_as_rank_0_finds(rank: int, *args: Any) -> Any:
    with mock.patch("lightning_ulysses.checks.trial.verdict.widest", first):
        return fit_and_listen(rank, *args)


def test_what_rank_0_may_join_is_wrong_on_others(pool: ProcessPool) -> None:
    """The angles that a slice counts from 0 are those of the first slice only."""
    kind, cls = architectures()["roformer"]
    config, batch, kind = tiny("roformer", kind, cls)
    reference = fit_single(partial(Tiny, cls, config), [[batch]], KINDS[kind].count)
    for result, _ in pool.run(fit_as_rank_0_finds, cls, config, [batch], world_size=2):
        assert compare(result, reference).largest > BOUND


def test_the_page_shows_the_lines() -> None:
    assert PAGE.read_text() == page(LINES)
