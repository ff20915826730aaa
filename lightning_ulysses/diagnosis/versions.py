"""Whether the packages that are installed are those that this package works with."""

from __future__ import annotations

import platform
import re
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

from lightning_ulysses.diagnosis.finding import Finding

_PACKAGE = "lightning-ulysses"


def _is_extra(requirement: Requirement) -> bool:
    # "extra == ''" is how a marker reads where nobody asked for an extra.
    return requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})


def _check(requirement: Requirement) -> Finding | None:
    bounds = str(requirement.specifier) or "any version"
    command = f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        if _is_extra(requirement):
            return None
        return Finding(requirement.name, f"not installed; needed: {bounds}", command)
    fits = requirement.specifier.contains(version, prereleases=True)
    return Finding(requirement.name, f"{version} (needed: {bounds})", None if fits else command)


def versions() -> list[Finding]:
    """A finding for Python, and for each package that is required, or installed and used if it is there."""
    try:
        facts = metadata.metadata(_PACKAGE)
    except metadata.PackageNotFoundError:
        return [Finding(_PACKAGE, "imported from a folder, so its requirements are not known", "pip install it")]
    python = SpecifierSet(facts["Requires-Python"] or "")
    good = python.contains(platform.python_version(), prereleases=True)
    mend = None if good else f"make an environment with Python {python}"
    found = [Finding("python", f"{platform.python_version()} (needed: {python})", mend)]
    for line in metadata.requires(_PACKAGE) or ():
        # Tools of those who change this package, and this package itself with its extras.
        if re.search(r"extra == ['\"]dev['\"]", line):
            continue
        try:
            finding = _check(Requirement(line))
        except InvalidRequirement:
            continue
        if finding is not None:
            found.append(finding)
    return found
