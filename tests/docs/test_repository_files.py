"""Files for GitHub and other tools agree with the Makefile and the package."""

from __future__ import annotations

import re

import pytest
import yaml
from documents import ROOT

import lightning_ulysses
from lightning_ulysses.cli.main import main

MAKEFILE = (ROOT / "Makefile").read_text()


def test_workflow_runs_targets_of_the_makefile() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = set(re.findall(r"^(\w+):", MAKEFILE, re.MULTILINE))
    assert {command.removeprefix("make ") for command in commands} == {"lint", "quick", "test", "docs"} <= targets
    assert jobs["quick"]["strategy"]["matrix"]["python"] == ["3.10", "3.13"]


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
