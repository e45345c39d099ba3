"""Versions of the files that a run writes.

A version is raised when an older reader would go wrong. Readers take their own version and all before it, and refuse
later ones; fields that they do not know they pass over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

CONFIG_VERSION = 2
"""``config.json``. Raised with every new setting, since a run with a setting ignored is another run. A setting that an
older file lacks has its default, which is what was done before there was the setting."""
METRICS_VERSION = 2
"""Records in ``metrics.jsonl``; those of version 1 say nothing of it, nor of skipped updates."""
SUMMARY_VERSION = 1
"""``summary.json``."""
EVENTS_VERSION = 1
"""Records in ``events.jsonl``."""
CHECKPOINT_VERSION = 2
"""Checkpoints; those of version 1 have no checksum."""


def check_version(what: str, version: Any, newest: int, error: Callable[[str], Exception] = ValueError) -> None:
    """Take a version from 1 to ``newest``.

    Raises:
        what ``error`` makes of a message that names ``what``.
    """
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise error(f"{what} has version {version!r}, which is none; expected a whole number from 1 to {newest}")
    if version > newest:
        raise error(
            f"{what} has version {version}, of a newer innerloop; this one reads versions up to {newest}. "
            "Upgrade: pip install --upgrade innerloop"
        )
