"""What Lightning offers around a step is exact, refused or different, as the table of features says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import feature_runs
import lightning_features as features
import pytest
from exact import BOUND
from nightly import sampled

from lightning_ulysses.geometry.distance import largest
from lightning_ulysses.testing.processes import ProcessPool

# One of each kind, in the sample.
KEPT = ("checkpoint", "ema", "csv", "val_interval", "resume", "predict", "two_optimizers", "metrics", "manual")


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, float) and not isinstance(found, str):
        return math.isclose(float(found), wanted, rel_tol=1e-5, abs_tol=1e-7)
    return bool(found == wanted)


def different(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs of what a run has told."""
    names = [*found, *(name for name in wanted if name not in found)]
    pairs = {name: (found.get(name), wanted.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if not same(*pair)}


@pytest.mark.parametrize("name", sampled(features.FEATURES, 6, KEPT))
@pytest.mark.filterwarnings("ignore")
def test_feature(pool: ProcessPool, name: str, tmp_path: Path) -> None:
    feature = features.FEATURES[name]
    results = pool.run(features.run, name, str(tmp_path / "split"), True, world_size=2)
    if feature.verdict == feature_runs.REFUSED:
        for _, _, message in results:
            assert feature.why in message
        return
    ((alone, told, problem),) = pool.run(features.run, name, str(tmp_path / "alone"), False, world_size=1)
    assert not problem
    differs = []
    for rank, (weights, seen, message) in enumerate(results):
        assert not message, message
        off = largest(
            float((weights[key] - value).norm() / value.norm().clamp_min(1e-30)) for key, value in alone.items()
        )
        # What only rank 0 has, such as files.
        told_here = told if seen or not rank else {}
        differs.append(off > BOUND or bool(different(seen, told_here)))
        assert feature.verdict != feature_runs.EXACT or not differs[-1], (off, different(seen, told_here))
    # A slice with all targets of a batch has the number of the whole.
    assert feature.verdict == feature_runs.EXACT or any(differs), "it does not differ: say so in the table"


def test_the_page_says_what_is_tested() -> None:
    assert len(features.FEATURES) >= 60
    assert features.PAGE.read_text() == features.table(), "run: python tests/support/lightning_features.py"
    assert all(each.why for each in features.FEATURES.values() if each.verdict != feature_runs.EXACT)
