"""Where torch builds extensions, among them the operators of DeepSpeed."""

from __future__ import annotations

import os
from pathlib import Path


def build_root() -> Path:
    """The folder of all builds (torch ``utils/cpp_extension.py``, ``_get_build_directory``)."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        return Path(given)
    from torch.utils.cpp_extension import get_default_build_root

    return Path(get_default_build_root())
