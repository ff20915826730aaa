"""Code in an interpreter of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def in_fresh_python(code: str, cwd: Path = ROOT, **environment: str) -> Any:
    """What a new interpreter prints last, as JSON."""
    env = {**os.environ, **environment}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=240
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])
