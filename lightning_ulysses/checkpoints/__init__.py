"""Sharded checkpoints: complete or refused by name, and loaded on any number of processes at any ZeRO stage."""

from lightning_ulysses.checkpoints.manifest import is_complete, newest_complete

__all__ = ["is_complete", "newest_complete"]
