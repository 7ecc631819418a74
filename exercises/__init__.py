"""Exercises in a repository: `python -m exercises make | grade | kill` (docs/teaching.md)."""
