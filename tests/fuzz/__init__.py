"""Fuzzing of what reads bytes of strangers: `python -m tests.fuzz --seconds 3600`.

Targets are pure functions of bytes over the sans-IO machines and the parsers, each with a model of
its own that says what may come of it: not to crash is not enough.
"""
