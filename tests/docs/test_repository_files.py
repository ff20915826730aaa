"""Files for GitHub and other tools agree with the Makefile and the package."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from documents import ROOT

import lightning_ulysses
from lightning_ulysses.cli.main import main

MAKEFILE = (ROOT / "Makefile").read_text()


TARGETS = set(re.findall(r"^(\w+):", MAKEFILE, re.MULTILINE))


def workflow(name: str) -> dict[Any, Any]:
    found: dict[Any, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
    return found


def commands(name: str) -> list[str]:
    return [step["run"] for job in workflow(name)["jobs"].values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("ci", {"lint", "quick", "test", "docs", "lowest"}),
        ("nightly", {"env", "nightly", "lowest"}),
        ("gpu", {"env"}),
        ("release", {"test"}),
    ],
)
def test_workflows_run_targets_of_the_makefile(name: str, targets: set[str]) -> None:
    assert {each.removeprefix("make ") for each in commands(name) if each.startswith("make ")} == targets <= TARGETS
    assert all("timeout-minutes" in job for job in workflow(name)["jobs"].values())
    # Files that a command names are there.
    named = re.findall(r"\b(?:tests/[\w./]+|CHANGELOG\.md)", " ".join(commands(name)))
    assert all((ROOT / each).exists() for each in named)


def test_both_ends_of_python_are_tested() -> None:
    assert workflow("ci")["jobs"]["quick"]["strategy"]["matrix"]["python"] == ["3.10", "3.13"]


def test_a_release_has_one_version() -> None:
    """The commands of the release accept this version, and no other."""
    # YAML reads `on` as true.
    assert workflow("release")[True]["push"]["tags"] == ["v*"]
    assert f"## [{lightning_ulysses.__version__}] - " in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", ["wrong_number", "failure"])
def test_issue_templates_ask_for_reports(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    asked = " ".join(part["attributes"]["label"] for part in form["body"])
    assert "verify --config my.yaml --json" in asked and "doctor --json" in asked
    assert len({part["id"] for part in form["body"]}) == len(form["body"])


def test_citation_has_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == lightning_ulysses.__version__ and citation["license"] == "Apache-2.0"


def test_pre_commit_runs_what_lint_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    programs = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in hooks}
    lint = MAKEFILE.partition("\nlint:")[2].partition("\n\n")[0]
    assert programs == set(re.findall(r"\$\(BIN\)/([\w-]+)", lint))


def test_version_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"lightning-ulysses {lightning_ulysses.__version__}\n"
