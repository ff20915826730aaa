"""Whether the packages that are installed are those that this package works with."""

from __future__ import annotations

import platform
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lightning_ulysses.diagnosis.finding import Finding
from lightning_ulysses.upstream.requirements import PACKAGE, installed, is_extra, requirements


def _check(requirement: Requirement) -> Finding | None:
    bounds = str(requirement.specifier) or "any version"
    command = f"pip install '{requirement.name}{requirement.specifier}'"
    version = installed(requirement.name)
    if version is None:
        if is_extra(requirement):
            return None
        return Finding(requirement.name, f"not installed; needed: {bounds}", command)
    fits = requirement.specifier.contains(version, prereleases=True)
    return Finding(requirement.name, f"{version} (needed: {bounds})", None if fits else command)


def versions() -> list[Finding]:
    """A finding for Python, and for each package that is required, or installed and used if it is there."""
    try:
        facts = metadata.metadata(PACKAGE)
    except metadata.PackageNotFoundError:
        return [Finding(PACKAGE, "imported from a folder, so its requirements are not known", "pip install it")]
    python = SpecifierSet(facts["Requires-Python"] or "")
    good = python.contains(platform.python_version(), prereleases=True)
    mend = None if good else f"make an environment with Python {python}"
    found = [Finding("python", f"{platform.python_version()} (needed: {python})", mend)]
    return found + [finding for requirement in requirements() if (finding := _check(requirement)) is not None]
