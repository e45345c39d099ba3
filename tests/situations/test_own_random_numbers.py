"""Noise from Python's, NumPy's or a generator of one's own falls alike where a step is computed again."""

from __future__ import annotations
