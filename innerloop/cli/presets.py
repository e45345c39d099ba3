"""``innerloop presets``: what there is to train."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from innerloop.methods import METHODS
from innerloop.training.config import PRESETS, ConfigError


def run(arguments: Sequence[str]) -> int:
    """Print the presets and the methods."""
    if arguments:
        raise ConfigError(f"innerloop presets takes no arguments, got {' '.join(arguments)}")
    table = Table("preset", "method", "what it trains", box=None, header_style="bold")
    for name, preset in PRESETS.items():
        table.add_row(name, preset.method, preset.about)
    console = Console()
    console.print(table)
    console.print(f"\nmethods: {', '.join(METHODS)}", highlight=False)
    return 0
