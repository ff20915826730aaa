"""The private part of transformers that says which flash-attn kernel a model runs on, pinned by a test."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def variable_length_function(implementation: str) -> Callable[..., Any] | None:
    """flash-attn's ``flash_attn_varlen_func`` for an ``attn_implementation``; None where the package is missing.

    Source: transformers ``modeling_flash_attention_utils.py``, ``_lazy_imports``.

    Args:
        implementation: ``"flash_attention_2"``, ``_3`` or ``_4``, or a kernel of the hub that a model has loaded.
    """
    from transformers import modeling_flash_attention_utils as package
    from transformers import utils

    if implementation.startswith("flash_attention_"):
        version = implementation.removeprefix("flash_attention_")
        available = getattr(utils, f"is_flash_attn_{version}_available", None)
        # transformers would load a kernel from the hub in place of a package that is missing.
        if available is None or not available():
            return None
    function = package._lazy_imports(implementation)[1]
    # Below an interceptor, where the package was imported before.
    return None if function is None else inspect.unwrap(function)
