"""Hypothesis for the sans-IO tests: the same examples in every run, and no clock."""

from __future__ import annotations

from hypothesis import settings

# No example database: it would leave files behind, and `derandomize` has no use for it.
settings.register_profile(
    "nbd", deadline=None, derandomize=True, database=None, max_examples=60, print_blob=True
)
settings.load_profile("nbd")
