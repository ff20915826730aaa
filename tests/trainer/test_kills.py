"""Nothing behind the last complete checkpoint is lost by SIGKILL: three moments of ``benchmarks/kills.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from kills import Size, survive


@pytest.mark.processes
def test_a_killed_run_goes_on_from_its_newest_complete_checkpoint(tmp_path: Path) -> None:
    moments = survive(tmp_path, 3, Size(stage=2, steps=12, width=32))
    assert len(moments) == 3 and any(after > 0 for _, _, after in moments)
