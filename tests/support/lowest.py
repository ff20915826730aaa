"""The lowest version of each package that this one needs, as constraints for pip.

python tests/support/lowest.py    # prints them; `make lowest` installs them
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Of these lists in pyproject.toml; tools of those who change the package may be newer.
_LISTS = ("dependencies", "hf", "report")


def lowest() -> dict[str, str]:
    """The lowest version by name, from the bounds in pyproject.toml.

    Raises:
        ValueError: For a requirement without a lower bound.
    """
    # Python 3.10 cannot read TOML by itself.
    text, found = (ROOT / "pyproject.toml").read_text(), {}
    for name in _LISTS:
        match = re.search(rf"^{name} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
        assert match is not None, name
        for line in re.findall(r'"([^"]+)"', match[1]):
            bound = re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)(?:,<[\d.]+)?", line)
            if bound is None:
                raise ValueError(f"{line!r} in {name} of pyproject.toml has no lower bound of the form name>=1.2")
            found[bound[1]] = bound[2]
    return found


if __name__ == "__main__":
    print("\n".join(f"{name}=={version}" for name, version in lowest().items()))
