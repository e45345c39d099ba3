"""Tables of recorded runs, as Markdown, CSV and (in the report's page) HTML.

Every table is of one task and one schedule. Accuracies are in percent, on test tasks of classes held out of training.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from innerloop.reports import paper
from innerloop.reports.estimates import DASH, Estimate, Which
from innerloop.reports.groups import Comparison, Group, differing, ending

NORMALISATIONS = {
    "batch": "its own batch's (transductive, as the papers)",
    "running": "running (inductive)",
    "support": "support set's (inductive)",
}
"""What normalises the query set, by its name in the records."""
NOT_RUN = "not run"
_BOTH: tuple[Which, ...] = ("ensemble", "best")


@dataclass(frozen=True)
class Table:
    """Text in rows and columns."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default_factory=tuple)

    def markdown(self) -> str:
        """A GitHub-flavoured table: caption above, notes below."""
        lines = [f"**{self.caption}**", ""] if self.caption else []
        lines += [_markdown_row(self.columns), "|" + "---|" * len(self.columns), *map(_markdown_row, self.rows)]
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines)

    def csv(self) -> str:
        """Columns and rows."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return out.getvalue()


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def paired(figure: Estimate | None, digits: int = 2) -> str:
    """Both spreads in one cell, each by its name: ``97.65 ± 0.05 over seeds, ± 0.31 over tasks``."""
    if figure is None:
        return DASH
    over_tasks = f"{figure.over_tasks(digits)} over tasks"
    if figure.deviation is None:
        return f"{figure.mean:.{digits}f} {over_tasks}"
    return f"{figure.over_seeds(digits)} over seeds, {over_tasks}"


SPREADS = (
    "± over seeds: sample standard deviation over seeds (none with one seed). ± over tasks: half-width of the 95% "
    "interval over test tasks of the mean."
)


@dataclass(frozen=True)
class AblationRow:
    """One line of the table of single repairs."""

    label: str
    group: Group | None
    """None: not run."""

    @property
    def paper(self) -> paper.PaperFigure | None:
        """The paper's figure for it, where it has one."""
        return None if self.group is None else self.group.paper_figure()


def ablation_rows(comparison: Comparison) -> list[AblationRow]:
    """The paper's rows in its order, whether they were run or not, and after them whatever else was run."""
    rows: list[AblationRow] = []
    left = list(comparison.groups)
    for label in paper.ABLATION_ROWS:
        of_row = [group for group in left if group.method == label]
        left = [group for group in left if group.method != label]
        rows += [AblationRow(group.label, group) for group in of_row] or [AblationRow(label, None)]
    return rows + [AblationRow(group.label, group) for group in left]


def ablation_paper_figure(comparison: Comparison, row: AblationRow) -> paper.PaperFigure | None:
    """The paper's figure for a row, also of one that was not run."""
    if row.group is not None:
        return row.paper
    run = comparison.groups[0].settings
    return paper.figure((run.get("data.dataset"), run.get("data.ways"), run.get("data.shots")), row.label)


def ablation_table(comparison: Comparison) -> Table:
    """Each repair by itself beside the paper's column: the ensemble of the best checkpoints, and the single best."""
    rows = []
    for row in ablation_rows(comparison):
        theirs = ablation_paper_figure(comparison, row)
        cells = [row.label]
        if row.group is None:
            cells += [NOT_RUN, *[DASH] * 4]
        else:
            cells.append(row.group.seeds_text())
            for which in _BOTH:
                cells += _two_cells(row.group.tested(which))
        rows.append([*cells, DASH if theirs is None else theirs.text()])
    return Table(
        caption=comparison.caption,
        columns=[
            "method",
            "seeds",
            "ensemble, %: mean ± deviation over seeds",
            "95% interval over tasks",
            "best checkpoint, %: mean ± deviation over seeds",
            "95% interval over tasks",
            "paper, %: mean ± deviation over seeds",
        ],
        rows=rows,
        notes=_ablation_notes(comparison),
    )


def _two_cells(figure: Estimate | None) -> list[str]:
    if figure is None:
        return [DASH, DASH]
    percent = figure.scaled(100)
    return [percent.over_seeds(), percent.over_tasks()]


def _ablation_notes(comparison: Comparison) -> list[str]:
    notes = [
        f"Test accuracy, transductive; {_members_text(comparison)}; "
        f"{_tasks_text(comparison)}. With one seed there is no deviation over seeds."
    ]
    if any(run.status != "finished" for group in comparison.groups for run in group.runs):
        notes.append("Figures are over the seeds that finished: those of rows with diverged runs are of the survivors.")
    run = comparison.groups[0].settings
    task = (run.get("data.dataset"), run.get("data.ways"), run.get("data.shots"))
    figures = paper.FIGURES.get(task)
    if figures:
        notes.append(
            "The paper's figures are of its full schedule, ensembles of five checkpoints, three seeds; its MAML is its "
            "authors' replication" + _original_text(task) + "."
        )
        if any(f.text().endswith("†") for f in figures.values()):
            notes.append("† ± as the method's own paper gives it, not a deviation over seeds of these runs.")
    return notes


def _original_text(task: Any) -> str:
    original = paper.ORIGINAL_MAML.get(task)
    return f" (MAML's own paper: {original.text().replace('†', ', as that paper gives it')})" if original else ""


def _members_text(comparison: Comparison) -> str:
    members = sorted(
        {int(run.summary["test"]["members"]) for group in comparison.groups for run in group.finished if run.summary}
    )
    if members == [1]:
        return "only the checkpoint best on validation was kept, so an ensemble is that one"
    return f"an ensemble is the {' or '.join(map(str, members)) or 'few'} checkpoints best on validation"


def _tasks_text(comparison: Comparison) -> str:
    tasks = {
        int(run.summary["test"]["best"]["batch"]["tasks"])
        for group in comparison.groups for run in group.finished if run.summary
    }  # fmt: skip
    return f"{' or '.join(map(str, sorted(tasks))) or 'no'} test tasks for each seed"


def ablation_numbers(comparison: Comparison) -> Table:
    """``ablation_table`` as numbers, a column for each kind of statistic: what the CSV file holds."""
    columns = ["task", "schedule", "method", "seeds_run", "seeds_finished", "seeds_diverged", "tasks_per_seed"]
    figures: list[tuple[Which, str]] = [(w, n) for w in _BOTH for n in NORMALISATIONS]
    for which, normalisation in figures:
        name = f"{which}_{normalisation}"
        columns += [f"{name}_mean", f"{name}_deviation_over_seeds", f"{name}_interval_over_tasks"]
    columns += ["paper_mean", "paper_spread", "paper_spread_is"]
    rows = []
    for row in ablation_rows(comparison):
        group, theirs = row.group, ablation_paper_figure(comparison, row)
        cells: list[Any] = [comparison.task, comparison.schedule, row.label]
        if group is None:
            cells += [0, 0, 0, "", *[""] * 3 * len(figures)]
        else:
            diverged = sum(run.status == "diverged" for run in group.runs)
            tested = group.tested("best")
            cells += [len(group.runs), len(group.finished), diverged, "" if tested is None else tested.tasks]
            for which, normalisation in figures:
                figure = group.tested(which, normalisation)
                cells += ["", "", ""] if figure is None else _numbers(figure.scaled(100))
        has_spread = theirs is not None and theirs.spread is not None
        cells += ["" if theirs is None else theirs.accuracy]
        cells += [theirs.spread, theirs.spread_is] if theirs is not None and has_spread else ["", ""]
        rows.append([str(cell) for cell in cells])
    return Table("", columns, rows)


def _numbers(percent: Estimate) -> list[Any]:
    deviation = "" if percent.deviation is None else f"{percent.deviation:.4f}"
    return [f"{percent.mean:.4f}", deviation, f"{percent.interval:.4f}"]


def accuracy_table(comparison: Comparison) -> Table:
    """What was reached: accuracy of the ensemble and the best checkpoint (regression: mean squared error)."""
    if not comparison.is_classification:
        return _loss_table(comparison)
    rows = []
    for group in comparison.groups:
        theirs = group.paper_figure()
        cells = [group.label, group.seeds_text()]
        for which in _BOTH:
            cells += _two_cells(group.tested(which))
        rows.append([*cells, DASH if theirs is None else theirs.text()])
    columns = [
        "method",
        "seeds",
        "ensemble, %: mean ± deviation over seeds",
        "95% interval over tasks",
        "best checkpoint, %: mean ± deviation over seeds",
        "95% interval over tasks",
        "paper, %: mean ± deviation over seeds",
    ]
    return Table(comparison.caption, columns, rows, _ablation_notes(comparison))


def _loss_table(comparison: Comparison) -> Table:
    rows = []
    for group in comparison.groups:
        cells = [group.label, group.seeds_text()]
        for which in _BOTH:
            figure = group.tested(which, "batch", "loss")
            cells += [DASH, DASH] if figure is None else [figure.over_seeds(4), figure.over_tasks(4)]
        rows.append(cells)
    columns = [
        "method",
        "seeds",
        "ensemble, mean squared error: mean ± deviation over seeds",
        "95% interval over tasks",
        "best checkpoint, mean squared error: mean ± deviation over seeds",
        "95% interval over tasks",
    ]
    note = f"{_tasks_text(comparison)}; {_members_text(comparison)}. With one seed there is no deviation over seeds."
    return Table(comparison.caption, columns, rows, [note])


def normalisation_table(comparison: Comparison) -> Table:
    """Every normalisation of the query set."""
    rows = []
    for group in comparison.groups:
        for which in _BOTH:
            figures = [group.tested(which, name) for name in NORMALISATIONS]
            name = "ensemble" if which == "ensemble" else "best checkpoint"
            rows.append([group.label, name, *(paired(f.scaled(100) if f else None) for f in figures)])
    return Table(
        caption=f"Test accuracy, %, by the statistics that normalise the query set. {comparison.caption}",
        columns=["method", "", *NORMALISATIONS.values()],
        rows=rows,
        notes=[SPREADS, f"{DASH}: not recorded; older runs do not have every normalisation."],
    )


def per_step_table(comparison: Comparison) -> Table:
    """The best checkpoint's figure after every inner step, 0 being before adaptation."""
    per_group = [
        [run.summary["test"]["per_step"] for run in group.finished if run.summary] for group in comparison.groups
    ]
    most = max((len(steps) for group in per_group for steps in group), default=0)
    figure, factor, digits = ("accuracy", 100, 2) if comparison.is_classification else ("loss", 1, 3)
    rows = []
    for group, runs in zip(comparison.groups, per_group, strict=True):
        cells = [group.label]
        for step in range(most):
            values = [factor * steps[step][figure] for steps in runs if step < len(steps)]
            cells.append(f"{sum(values) / len(values):.{digits}f}" if values else DASH)
        rows.append(cells)
    what = "Test accuracy, %" if comparison.is_classification else "Test mean squared error"
    return Table(
        caption=f"{what}, after each inner step (0: before adaptation). {comparison.caption}",
        columns=["method", *map(str, range(most))],
        rows=rows,
        notes=[
            "Best checkpoint, transductive; mean over seeds."
            if comparison.is_classification
            else "Best checkpoint; mean over seeds."
        ],
    )


def differences_table(comparison: Comparison) -> Table | None:
    """Settings in which the groups differ; None where there is no more than one group."""
    apart = differing(comparison.groups)
    if not apart:
        return None
    rows = [[name.split(".", 1)[1], *(_setting_cell(value) for value in values)] for name, values in apart.items()]
    return Table(
        f"Settings that differ. {comparison.caption}",
        ["setting", *(group.label for group in comparison.groups)],
        rows,
        [f"{DASH}: has no effect there."],
    )


def _setting_cell(value: Any) -> str:
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return str(value)


def runs_table(comparison: Comparison) -> Table:
    """Every run: seed, how it ended, time, hardware, commit."""
    rows = []
    for group in comparison.groups:
        for run in group.runs:
            where = (run.summary or {}).get("environment", {})
            seconds = run.summary["train_seconds"] if run.summary else run.epochs[-1].seconds if run.epochs else 0.0
            state = "finished" if run.status == "finished" else ending(run).removeprefix(f"seed {run.seed} ")
            hardware = f"{where['device']}, {where['cores']} cores, torch {where['torch']}" if where else DASH
            rows.append(
                [group.label, str(run.seed), state, duration(seconds), hardware, str(where.get("commit") or DASH)]
            )
    columns = ["method", "seed", "state", "training time", "hardware", "commit"]
    return Table(f"Runs. {comparison.caption}", columns, rows)


def duration(seconds: float) -> str:
    """``48 s``, ``6.7 min`` or ``3.2 h``."""
    if not seconds >= 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
