"""The figures of a run and of single tasks, as PNG files.

Every figure is one or more panels; the functions that draw a panel on Axes are in ``run_panels`` and
``task_panels``, for those who compose their own figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from innerloop.reports import run_panels as panels
from innerloop.reports.records import RunRecords, read_run
from innerloop.reports.style import figure_at
from innerloop.reports.task_panels import CurveTask, TaskPicture, curve_panel, task_panel, task_size

__all__ = [
    "CurveTask",
    "TaskPicture",
    "draw_adapted_curves",
    "draw_overview",
    "draw_task",
    "write_run_figures",
]


def write_run_figures(run: Path) -> list[Path]:
    """Draw what ``run/metrics.jsonl`` holds so far into ``run/figures``.

    These are ``accuracy.png`` (``loss.png`` for regression), ``inner_steps.png``, ``rates.png`` (if inner
    rates were recorded), ``msl_weights.png`` and ``gradient_norm.png``. Good from the first finished epoch
    on, so it may be called after each.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: ``run`` has no ``metrics.jsonl``.
        ValueError: it holds no finished epoch, or a line that is not one.
    """
    records = read_run(run)
    over_epochs = ("accuracy", panels.accuracy_panel) if records.is_classification else ("loss", panels.loss_panel)
    wanted: list[tuple[str, Callable[[Axes, RunRecords], None], tuple[float, float]]] = [
        (*over_epochs, (6.4, 4.0)),
        ("inner_steps", panels.inner_steps_panel, (6.2, 4.0)),
        ("msl_weights", panels.msl_weights_panel, (6.8, 3.8)),
        ("gradient_norm", panels.gradient_norm_panel, (6.4, 3.8)),
    ]
    rates = records.epochs[-1].rates
    if rates:
        steps = max(len(values) for values in rates.values())
        size = (min(max(3.6 + 0.55 * steps, 5.0), 14.0), min(max(1.4 + 0.22 * len(rates), 2.6), 16.0))
        wanted.insert(2, ("rates", panels.rates_panel, size))
    paths = []
    for name, panel, (width, height) in wanted:
        path = run / "figures" / f"{name}.png"
        with figure_at(path, width, height) as figure:
            panel(figure.add_subplot(), records)
        paths.append(path)
    return paths


def draw_task(path: Path, task: TaskPicture) -> Path:
    """The picture of one few-shot task being learned."""
    size = task_size(task)
    unit = min(0.62, 12.0 / size.width)
    with figure_at(path, unit * size.width + 0.3, unit * size.height + 0.4) as figure:
        task_panel(figure.add_subplot(), task, unit=unit)
    return path


def draw_adapted_curves(path: Path, *, tasks: Sequence[CurveTask]) -> Path:
    """Regression tasks before and after adaptation, a panel for each, three in a row."""
    if not tasks:
        raise ValueError("tasks is empty: give at least one CurveTask")
    columns = min(len(tasks), 3)
    rows = math.ceil(len(tasks) / columns)
    with figure_at(path, 3.4 * columns + 0.4, 4.0 * rows) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for index, axes in enumerate(grid.flat):
            if index >= len(tasks):
                axes.axis("off")
                continue
            curve_panel(axes, tasks[index], title=f"Task {index + 1}" if len(tasks) > 1 else "")
            axes.tick_params(labelbottom=True)
            if index % columns == 0:
                axes.set_ylabel("output y")
    return path


def draw_overview(path: Path, run: Path, *, task: TaskPicture) -> Path:
    """A wide picture (1920 x 688 pixels) for a README: a task being learned, the run, the inner steps."""
    records = read_run(run)
    shown = 5
    size = task_size(task, most_classes=shown, most_shots=2)
    width = 5.6
    with figure_at(path, 12.0, 4.3) as figure:
        left, middle, right = figure.subplots(1, 3, width_ratios=[width, 3.3, 3.0])
        task_panel(left, task, most_classes=shown, most_shots=2, unit=0.95 * width / size.width)
        (panels.accuracy_panel if records.is_classification else panels.loss_panel)(middle, records)
        panels.inner_steps_panel(right, records, beside=False)
    return path
