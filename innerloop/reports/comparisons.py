"""Tables and figures over several runs, written to a folder: functions of run folders and nothing else.

A grid of runs (``GRID/ROW/seed-S``) is given as its folder:

>>> grid = Path("runs/ablation-omniglot-20way-1shot")
>>> write_ablation([grid], out=grid)  # doctest: +SKIP

Runs are found by their ``config.json``, also those that have not finished; what differs in nothing but the seed is one
row. Runs of different tasks or schedules make files of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from innerloop.reports import comparison_panels as panels
from innerloop.reports.files import write_text
from innerloop.reports.groups import Comparison, comparisons, find_runs
from innerloop.reports.style import figure_at
from innerloop.reports.tables import ablation_numbers, ablation_rows, ablation_table, normalisation_table


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
    numbers = ablation_numbers(comparison)
    picture = out / f"ablation{end}.png"
    labels = [panels.ablation_label(row) for row in ablation_rows(comparison)]
    height = max(0.42, *(0.08 + 0.14 * len(label.splitlines()) for label in labels))
    with figure_at(picture, 7.6, 1.7 + height * len(labels)) as figure:
        axes = figure.add_subplot()
        panels.ablation_panel(axes, comparison)
        panels.title(axes, comparison.task, comparison.schedule)
    return [
        write_text(out / f"ablation{end}.md", text),
        write_text(out / f"ablation{end}.csv", numbers.csv()),
        picture,
    ]
