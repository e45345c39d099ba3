"""Tables and figures over several runs, written to a folder: functions of run folders and nothing else.

A grid of runs (``GRID/ROW/seed-S``) is given as its folder:

>>> grid = Path("runs/ablation-omniglot-20way-1shot")
>>> write_grid([grid], out=grid)  # doctest: +SKIP

Runs are found by their ``config.json``, also those that have not finished; what differs in nothing but the seed is one
row. Runs of different tasks or schedules make files of their own.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from innerloop.reports import comparison_panels as panels
from innerloop.reports.files import write_text
from innerloop.reports.groups import Comparison, comparisons, find_runs
from innerloop.reports.style import figure_at
from innerloop.reports.tables import (
    AblationRow,
    ablation_numbers,
    ablation_rows,
    ablation_table,
    accuracy_table,
    is_ablation,
    normalisation_table,
    per_step_table,
    speed_table,
    steps_groups,
    steps_table,
)


def write_grid(runs: Iterable[Path], out: Path) -> list[Path]:
    """Every table and figure that says something about these runs: what ``innerloop ablate`` leaves in a grid's folder.

    ``results.md`` always (accuracy, normalisations, inner steps); of ``write_ablation``, ``write_steps``,
    ``write_stability`` and ``write_speed`` those that fit what was run; ``rows.png`` of three rows and more that are
    neither single repairs nor numbers of steps. Takes, returns and raises what ``write_ablation`` does.
    """
    written = []
    for comparison, end in _each(runs):
        tables = [accuracy_table(comparison), normalisation_table(comparison), per_step_table(comparison)]
        text = "\n\n".join(table.markdown() for table in tables)
        written.append(write_text(out / f"results{end}.md", f"{text}\n"))
        for kind in fitting(comparison):
            written += _WRITERS[kind](comparison, out, end)
    return written


Kind = Literal["ablation", "steps", "rows", "stability", "speed"]


def fitting(comparison: Comparison) -> list[Kind]:
    """Which figures say something about these groups."""
    kinds: list[Kind] = []
    if len(steps_groups(comparison)[0]) > 1:
        kinds.append("steps")
    elif is_ablation(comparison):
        kinds.append("ablation")
    elif len(comparison.groups) > 2 and any(group.finished for group in comparison.groups):
        kinds.append("rows")
    if not any(run.epochs for group in comparison.groups for run in group.runs):
        return kinds
    if len(comparison.groups) <= 4:
        kinds.append("stability")
    if {"MAML", "MAML++"} <= {group.method for group in comparison.groups}:
        kinds.append("speed")
    return kinds


def write_ablation(runs: Iterable[Path], out: Path) -> list[Path]:
    """The table of single repairs beside the paper's: ``ablation.md``, ``ablation.csv`` and ``ablation.png``.

    The paper's rows are all there, in its order; those of which there is no run say so. Other methods that were run
    come after them. With runs of several tasks or schedules there is one such set of files for each, with the task and
    schedule in their names.

    Args:
        runs: run folders, or folders of them; those that have not finished are shown as such.
        out: where the files go.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: a damaged record, or runs of regression only, for which the paper has no such table.
    """
    return [path for comparison, end in _each(runs) for path in _write_ablation(comparison, out, end)]


def _each(runs: Iterable[Path]) -> list[tuple[Comparison, str]]:
    """The comparisons among these runs that have accuracies, and what tells their files apart."""
    found = [comparison for comparison in comparisons(find_runs(runs)) if comparison.is_classification]
    if not found:
        raise ValueError("these runs are of regression only: the paper's tables are of accuracies")
    if len(found) == 1:
        return [(found[0], "")]
    slugs = [comparison.slug for comparison in found]
    return [
        (comparison, f"-{slug}" + (f"-{place + 1}" if slugs.count(slug) > 1 else ""))
        for place, (comparison, slug) in enumerate(zip(found, slugs, strict=True))
    ]


def _write_ablation(comparison: Comparison, out: Path, end: str) -> list[Path]:
    text = f"{ablation_table(comparison).markdown()}\n\n{normalisation_table(comparison).markdown()}\n"
    return [
        write_text(out / f"ablation{end}.md", text),
        write_text(out / f"ablation{end}.csv", ablation_numbers(comparison).csv()),
        draw_ablation(comparison, out / f"ablation{end}.png"),
    ]


def draw_ablation(comparison: Comparison, path: Path) -> Path:
    """``rows_panel`` of the paper's rows."""
    return _draw_rows(comparison, ablation_rows(comparison), path)


def _write_rows(comparison: Comparison, out: Path, end: str) -> list[Path]:
    return [draw_rows(comparison, out / f"rows{end}.png")]


def draw_rows(comparison: Comparison, path: Path) -> Path:
    """``rows_panel`` of what was run, whatever the paper's rows."""
    return _draw_rows(comparison, [AblationRow(group.label, group) for group in comparison.groups], path)


def _draw_rows(comparison: Comparison, rows: Sequence[AblationRow], path: Path) -> Path:
    labels = [panels.ablation_label(row) for row in rows]
    height = max(0.42, *(0.08 + 0.14 * len(label.splitlines()) for label in labels))
    with figure_at(path, 7.6, 1.9 + height * len(labels)) as figure:
        axes = figure.add_subplot()
        panels.rows_panel(axes, comparison, rows)
        panels.title(axes, comparison.task, comparison.schedule)
    return path


def write_steps(runs: Iterable[Path], out: Path) -> list[Path]:
    """MAML++ by its number of inner steps, against five-step MAML: ``steps.md`` and ``steps.png`` in ``out``.

    Takes, returns and raises what ``write_ablation`` does; where there is no MAML++ nothing is written.
    """
    found = [(comparison, end) for comparison, end in _each(runs) if steps_groups(comparison)[0]]
    return [path for comparison, end in found for path in _write_steps(comparison, out, end)]


def _write_steps(comparison: Comparison, out: Path, end: str) -> list[Path]:
    return [
        write_text(out / f"steps{end}.md", steps_table(comparison).markdown() + "\n"),
        draw_steps(comparison, out / f"steps{end}.png"),
    ]


def draw_steps(comparison: Comparison, path: Path) -> Path:
    """``steps_panel`` of ensembles and of best checkpoints."""
    steps, five = steps_groups(comparison)
    with figure_at(path, 9.6, 4.8) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        panels.steps_panel(left, steps, five, "ensemble")
        panels.steps_panel(right, steps, five, "best")
        panels.title(left, f"{comparison.task}: inner steps", comparison.schedule, width=64)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return path


def write_stability(runs: Iterable[Path], out: Path) -> list[Path]:
    """Whether training goes well from every seed: ``stability.png`` in ``out``, the paper's figure 1.

    Takes, returns and raises what ``write_ablation`` does.
    """
    return [path for comparison, end in _each(runs) for path in _write_stability(comparison, out, end)]


def _write_stability(comparison: Comparison, out: Path, end: str) -> list[Path]:
    return [draw_stability(comparison, out / f"stability{end}.png")]


def draw_stability(comparison: Comparison, path: Path) -> Path:
    """A column for each method: validation over the epochs, and the norms of the meta-gradient that explain it.

    Runs that diverged end in a cross.
    """
    groups = comparison.groups
    across = min(len(groups), 4)
    bands = math.ceil(len(groups) / across)
    text = f"{comparison.task}{_network(comparison)}. {comparison.schedule}"
    with figure_at(path, max(3.7 * across + 0.6, 5.6), 4.7 * bands + 1.3) as figure:
        grid = figure.subplots(2 * bands, across, sharex=True, squeeze=False, height_ratios=[1.25, 1] * bands)
        for place, axes in enumerate(grid.flat):
            if (place // (2 * across)) * across + place % across >= len(groups):
                axes.axis("off")
        tops, bottoms = [], []
        for place, (group, look) in enumerate(zip(groups, panels.group_styles(groups), strict=True)):
            band, column = divmod(place, across)
            top, bottom = grid[2 * band, column], grid[2 * band + 1, column]
            panels.curves_panel(top, [group], legend=False, look=look)
            panels.norms_panel(bottom, group, look)
            top.set_title("\n".join(textwrap.wrap(group.label, 40)))
            top.set_xlabel("")
            bottom.tick_params(labelbottom=True)
            if column:
                top.set_ylabel("")
                bottom.set_ylabel("")
            tops.append(top)
            bottoms.append(bottom)
        for rows in (tops, bottoms):
            low, high = (end(axes.get_ylim()[place] for axes in rows) for place, end in ((0, min), (1, max)))
            for axes in rows:
                axes.set_ylim(low, high)
                if axes.get_yscale() == "log":
                    panels.plain_log_ticks(axes)
        figure.suptitle("\n".join(textwrap.wrap(text, max(44 * across, 70))), fontsize=8, x=0.01, ha="left")
        handles = [*panels.legend_handles(groups), *panels.norm_handles()]
        figure.legend(handles=handles, loc="outside lower center", ncols=2 if across > 1 else 1)
    return path


def _network(comparison: Comparison) -> str:
    strided = {group.settings.get("network.strided") for group in comparison.groups}
    return ", strided convolutions" if strided == {True} else ""


def write_speed(runs: Iterable[Path], out: Path) -> list[Path]:
    """How fast each method learns: ``speed.md`` and ``speed.png`` in ``out``.

    Validation accuracy over outer updates and, beside it, over the time of training; and after how many of either it
    was first at 60, 70, 80, 90 and 95%. Of MAML and MAML++ if both were run, else of everything. Takes, returns and
    raises what ``write_ablation`` does.
    """
    return [path for comparison, end in _each(runs) for path in _write_speed(comparison, out, end)]


def _write_speed(comparison: Comparison, out: Path, end: str) -> list[Path]:
    comparison = against_maml(comparison)
    if not any(run.epochs for group in comparison.groups for run in group.runs):
        return []
    return [
        write_text(out / f"speed{end}.md", speed_table(comparison).markdown() + "\n"),
        draw_speed(comparison, out / f"speed{end}.png"),
    ]


def against_maml(comparison: Comparison) -> Comparison:
    """MAML and MAML++ alone, where both were run; else all there is."""
    groups = tuple(group for group in comparison.groups if group.method in ("MAML", "MAML++"))
    return replace(comparison, groups=groups) if len({group.method for group in groups}) == 2 else comparison


def draw_speed(comparison: Comparison, path: Path) -> Path:
    """``curves_panel`` over outer updates and over time."""
    groups = comparison.groups
    with figure_at(path, 9.6, 4.2 + 0.16 * len(groups)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        panels.curves_panel(left, groups, clock="iterations", legend=False)
        panels.curves_panel(right, groups, clock="seconds", legend=False)
        right.set_ylabel("")
        panels.title(left, f"{comparison.task}: speed of convergence", comparison.schedule, width=64)
        handles = panels.legend_handles(groups)
        figure.legend(handles=handles, loc="outside lower center", ncols=2 if len(groups) < 5 else 1)
    return path


_WRITERS: dict[Kind, Callable[[Comparison, Path, str], list[Path]]] = {
    "ablation": _write_ablation,
    "steps": _write_steps,
    "rows": _write_rows,
    "stability": _write_stability,
    "speed": _write_speed,
}
