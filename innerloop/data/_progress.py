"""The progress bar of everything that may take long."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)


def progress_bar(*amounts: ProgressColumn, show: bool) -> Progress:
    """A bar with the time left, on standard error so that what a program prints can be piped.

    ``amounts`` are the columns that say how much is done; by default "done/total".
    """
    middle = amounts or (MofNCompleteColumn(),)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), *middle, TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not (show and console.is_terminal))
