"""What a person sees while a run goes on: a bar with the time left, and a line for each epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

from innerloop.training.time_left import duration


class Bar:
    """One bar in progress."""

    def __init__(self, progress: RichProgress | None, task: Any = None) -> None:
        self._progress, self._task = progress, task

    def advance(self, steps: int = 1, status: str = "") -> None:
        """More steps done; ``status`` is shown beside the bar."""
        if self._progress is not None:
            self._progress.update(self._task, advance=steps, status=status)


class _Left(TimeRemainingColumn):
    """The time left of all of the work, where it is known; otherwise of the bar."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(compact=True)
        self.progress = progress

    def render(self, task: Task) -> Text:
        """The text beside the bar."""
        left = self.progress.remaining()
        return super().render(task) if left is None else Text(duration(left), style="progress.remaining")


class Progress:
    """Progress on standard error, so that standard output stays a result. Not ``shown``: silent."""

    def __init__(self, shown: bool = True) -> None:
        self.shown = shown
        self.console = Console(stderr=True, quiet=not shown)
        self._estimated = False
        self.remaining: Callable[[], float | None] = lambda: None
        """Seconds that all of the work still takes, where it has more parts than the bar shown; None: not known."""

    def warn(self, message: str) -> None:
        """Something that went wrong and is to be seen whether or not progress is."""
        self.console.quiet = False
        self.console.print(f"[bold yellow]warning:[/] {escape(message)}", highlight=False, soft_wrap=True)
        self.console.quiet = not self.shown

    @contextmanager
    def task(self, name: str, total: int, completed: int = 0) -> Iterator[Bar]:
        """A bar of ``total`` steps; without a terminal, nothing."""
        if not (self.shown and self.console.is_terminal):
            yield Bar(None)
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("left"),
            _Left(self),
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}"),
        )
        with RichProgress(*columns, console=self.console, transient=True) as progress:
            yield Bar(progress, progress.add_task(name, total=total, completed=completed, status=""))

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A spinner for what takes seconds and has no steps to count; without a terminal, nothing."""
        if not (self.shown and self.console.is_terminal):
            yield
            return
        with self.console.status(what):
            yield

    def estimate(self, words: str | None) -> None:
        """How long all will take, the first time that it is known."""
        if words and not self._estimated:
            self.console.print(words, highlight=False)
            self._estimated = True

    def epoch(self, record: Mapping[str, Any], epochs: int) -> None:
        """A line for a finished epoch."""
        if record["val_accuracy"] is None:
            train, val = (
                f"{record['train_loss']:.4f}",
                f"{record['val_loss']:.4f} ± {record['val_interval']:.4f}",
            )
            figures = f"train loss {train}  validation loss {val}"
        else:
            val = f"{record['val_accuracy']:.2%} ± {record['val_interval']:.2%}"
            figures = f"train {record['train_accuracy']:.2%}  validation {val}"
        left = self.remaining()
        self.console.print(
            f"epoch {record['epoch']}/{epochs}  {figures} ({record['val_tasks']} tasks)  "
            f"order {record['derivative_order']}  outer rate {record['outer_lr']:.1e}  "
            f"{record['tasks_per_second']:.1f} tasks/s" + ("" if left is None else f"  about {duration(left)} left"),
            highlight=False,
            soft_wrap=True,
        )
