"""The figures of a run: its records, and a test task learned by its best checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from innerloop.training.config import Config
from innerloop.training.run_folder import RunFolder


def write_figures(folder: RunFolder, config: Config) -> list[Path]:
    return []
