"""Callbacks for training on split sequences."""

from __future__ import annotations

from lightning_ulysses.callbacks.token_count import TokenCountMonitor

__all__ = ["TokenCountMonitor"]
