"""Checks that refuse a run before its first step or during it."""
