"""Versions are checked when a run is set up."""

from __future__ import annotations

import sys
import warnings
from importlib import metadata
from types import ModuleType

import lightning as L
import pytest

from lightning_ulysses import UlyssesDeepSpeedStrategy, UlyssesError, UlyssesFabricStrategy
from lightning_ulysses.upstream import requirements

LINES = [
    "torch>=2.11",
    "deepspeed<0.20,>=0.19.5",
    "lightning",
    "transformers>=5.4; extra == 'hf'",
    "ruff>=9; extra == 'dev'",
]


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions that seem to be installed, which a test may change."""
    found = {"torch": "2.13.0+cpu", "deepspeed": "0.19.5", "lightning": "2.6.0", "ruff": "0.9", "transformers": "5.0.0"}
    monkeypatch.setattr(metadata, "version", found.__getitem__)
    monkeypatch.setattr(metadata, "requires", lambda name: LINES)
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    requirements._check.cache_clear()
    yield found  # type: ignore[misc]
    requirements._check.cache_clear()


def test_what_fits_is_accepted(versions: dict[str, str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        requirements.check_versions()


def test_older_ones_are_refused_in_one_sentence(versions: dict[str, str]) -> None:
    versions.update(deepspeed="0.19.4", torch="2.10.0")
    with pytest.raises(UlyssesError) as caught:
        requirements.check_versions()
    assert caught.value.got == "torch 2.10.0, deepspeed 0.19.4"
    assert caught.value.fix == "pip install 'torch>=2.11' 'deepspeed<0.20,>=0.19.5'"


def test_an_extra_counts_once_it_is_imported(versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    requirements.check_versions()
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    with pytest.raises(UlyssesError, match=r"transformers 5\.0\.0"):
        requirements.check_versions()


def test_newer_ones_are_warned_of(versions: dict[str, str]) -> None:
    versions["deepspeed"] = "0.20.1"
    with pytest.warns(UserWarning, match=r"deepspeed 0\.20\.1 is newer"):
        requirements.check_versions()


def test_strategies_check(versions: dict[str, str]) -> None:
    versions["deepspeed"] = "0.19.0"
    strategy = UlyssesDeepSpeedStrategy(sp_size=1)
    L.Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    fabric = L.Fabric(strategy=UlyssesFabricStrategy(sp_size=1), accelerator="cpu", devices=1)
    for set_up in (strategy.setup_environment, fabric.launch):
        with pytest.raises(UlyssesError, match=r"deepspeed 0\.19\.0"):
            set_up()
