"""Whether the packages that are installed are those that this package was tested with."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import Version

from lightning_ulysses.errors import UlyssesError

PACKAGE = "lightning-ulysses"


def is_extra(requirement: Requirement) -> bool:
    """Whether a requirement is one of an extra only."""
    # "extra == ''" is how a marker reads where nobody asked for an extra.
    return requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})


def requirements() -> Iterator[Requirement]:
    """Those of the package and its extras; none of tools for those who change it, or where it is no package."""
    try:
        lines = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return
    for line in lines:
        if re.search(r"extra == ['\"](dev|docs)['\"]", line):
            continue
        try:
            yield Requirement(line)
        except InvalidRequirement:
            continue


def installed(name: str) -> str | None:
    """The version of a package; None if it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_versions() -> None:
    """Refuses packages that are older than those that this package works with, and warns of newer ones.

    Of an extra, only packages that the program has imported count.

    Raises:
        UlyssesError: With all of them, and the command that installs others.
    """
    _check(frozenset(name for name in sys.modules if "." not in name))


@cache
def _check(modules: frozenset[str]) -> None:
    older: list[tuple[Requirement, str]] = []
    newer: list[tuple[Requirement, str]] = []
    for requirement in requirements():
        version = installed(requirement.name)
        if is_extra(requirement) and requirement.name.replace("-", "_") not in modules:
            continue
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            (older if _is_older(version, requirement) else newer).append((requirement, version))
    if older:
        raise UlyssesError(
            ", ".join(f"{requirement.name} {version}" for requirement, version in older),
            ", ".join(f"{requirement.name}{requirement.specifier}" for requirement, _ in older),
            "pip install " + " ".join(f"'{requirement.name}{requirement.specifier}'" for requirement, _ in older),
        )
    for requirement, version in newer:
        warnings.warn(
            f"{requirement.name} {version} is newer than the versions that were tested, "
            f"{requirement.name}{requirement.specifier}. If a step is refused or differs, install one of these.",
            stacklevel=4,
        )


def _is_older(version: str, requirement: Requirement) -> bool:
    lower = [Version(each.version) for each in requirement.specifier if each.operator in (">=", ">", "==", "~=")]
    return any(Version(version) < bound for bound in lower)
