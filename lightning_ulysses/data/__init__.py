"""Data that fills every token: documents packed into rows."""

from __future__ import annotations

from lightning_ulysses.data.collate import PackingCollator

__all__ = ["PackingCollator"]
