"""Replaces functions and restores them, finds copies that were bound early, and keeps functions out of graphs."""
