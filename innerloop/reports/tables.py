"""Tables of recorded runs, as Markdown, CSV and (in the report's page) HTML.

Every table is of one task and one schedule. Accuracies are in percent, on test tasks of classes held out of training.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from innerloop.reports import paper
from innerloop.reports.estimates import DASH, Estimate, Which
from innerloop.reports.groups import Comparison, Group, differing, ending
from innerloop.reports.records import RunRecords

NORMALISATIONS = {
    "batch": "its own batch's (transductive, as the papers)",
    "running": "running (inductive)",
    "support": "support set's (inductive)",
}
"""What normalises the query set, by its name in the records."""
NOT_RUN = "not run"
_BOTH: tuple[Which, ...] = ("ensemble", "best")
_FIGURE_COLUMNS = (
    "seeds",
    "ensemble, %: mean ± deviation over seeds",
    "95% interval over tasks",
    "best checkpoint, %: mean ± deviation over seeds",
    "95% interval over tasks",
)
_PAPER_COLUMN = "paper, %: mean ± deviation over seeds"


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


def is_ablation(comparison: Comparison) -> bool:
    """Whether so many of the paper's rows were run that the others are missing."""
    return len(comparison.groups) > 3 and len({g.method for g in comparison.groups} & set(paper.ABLATION_ROWS)) > 2


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
        cells = [row.label, *_figure_cells(row.group)]
        rows.append([*cells, DASH if theirs is None else theirs.text()])
    return Table(
        caption=comparison.caption,
        columns=["method", *_FIGURE_COLUMNS, _PAPER_COLUMN],
        rows=rows,
        notes=_ablation_notes(comparison, rows),
    )


def _two_cells(figure: Estimate | None) -> list[str]:
    if figure is None:
        return [DASH, DASH]
    percent = figure.scaled(100)
    return [percent.over_seeds(), percent.over_tasks()]


def _ablation_notes(comparison: Comparison, rows: Sequence[Sequence[str]]) -> list[str]:
    notes = [
        f"Test accuracy, transductive; {_members_text(comparison)}; "
        f"{_tasks_text(comparison)}. With one seed there is no deviation over seeds."
    ]
    if any(run.status != "finished" for group in comparison.groups for run in group.runs):
        notes.append("Figures are over the seeds that finished: those of rows with diverged runs are of the survivors.")
    run = comparison.groups[0].settings
    task = (run.get("data.dataset"), run.get("data.ways"), run.get("data.shots"))
    figures = paper.FIGURES.get(task)
    if figures and any(row[-1] != DASH for row in rows):
        notes.append(
            "The paper's figures are of its full schedule, ensembles of five checkpoints, three seeds; its MAML is its "
            "authors' replication" + _original_text(task) + "."
        )
        if any(row[-1].endswith("†") for row in rows):
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
        for group in comparison.groups
        for run in group.finished
        if run.summary
    }
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
        cells = [group.label, *_figure_cells(group)]
        rows.append([*cells, DASH if theirs is None else theirs.text()])
    columns = ["method", *_FIGURE_COLUMNS, _PAPER_COLUMN]
    return Table(comparison.caption, columns, rows, _ablation_notes(comparison, rows))


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


def steps_groups(comparison: Comparison) -> tuple[dict[int, Group], Group | None]:
    """MAML++ by its number of inner steps, and five-step MAML, None where it was not run."""
    steps: dict[int, Group] = {}
    for group in comparison.groups:
        if group.method == "MAML++":
            steps.setdefault(group.inner_steps, group)
    five = [group for group in comparison.groups if group.method == "MAML" and group.inner_steps == 5]
    return steps, five[0] if five else None


def steps_table(comparison: Comparison) -> Table:
    """MAML++ with 1 .. 5 inner steps, and five-step MAML, beside the paper's."""
    steps, five = steps_groups(comparison)
    run = comparison.groups[0].settings
    task = (run.get("data.dataset"), run.get("data.ways"), run.get("data.shots"))
    lines = [("MAML, 5 inner steps", five, paper.figure(task, "MAML"))]
    for count in sorted({1, 2, 3, 4, 5, *steps}):
        name = f"MAML++, {count} inner step{'s' * (count != 1)}"
        lines.append((name, steps.get(count), paper.figure(task, "MAML++", count)))
    rows = []
    for name, group, theirs in lines:
        cells = [name, *_figure_cells(group)]
        rows.append([*cells, DASH if theirs is None else theirs.text()])
    notes = [*(steps_words(comparison, which) for which in _BOTH), *_ablation_notes(comparison, rows)]
    return Table(comparison.caption, ["method", *_FIGURE_COLUMNS, _PAPER_COLUMN], rows, notes)


def steps_words(comparison: Comparison, which: Which) -> str:
    """One-step MAML++ against five-step MAML, in words, whichever way it came out."""
    steps, five = steps_groups(comparison)
    one = steps[1].tested(which) if 1 in steps else None
    maml = None if five is None else five.tested(which)
    name = "Ensembles" if which == "ensemble" else "Best checkpoints"
    if one is None or maml is None:
        return f"{name}: one-step MAML++ against five-step MAML: not both were run."
    one, maml = one.scaled(100), maml.scaled(100)
    gap = one.mean - maml.mean
    words = "ahead of" if gap > 0 else "behind" if gap < 0 else "level with"
    text = f"{name}: one-step MAML++ ({paired(one)}) is {words} five-step MAML ({paired(maml)})"
    text += f", by {abs(gap):.2f} points" if gap else ""
    if one.deviation is not None and maml.deviation is not None:
        spread = math.hypot(one.deviation, maml.deviation)
        more = "more" if abs(gap) > spread else "no more"
        return f"{text}: {more} than their deviations over seeds put together ({spread:.2f})."
    spread = math.hypot(one.interval, maml.interval)
    return (
        f"{text}: {'more' if abs(gap) > spread else 'no more'} than the 95% interval over tasks of the difference "
        f"(± {spread:.2f}); with one seed, that of another training run is not known."
    )


def _figure_cells(group: Group | None) -> list[str]:
    """Seeds, and both figures with both spreads."""
    if group is None:
        return [NOT_RUN, *[DASH] * 4]
    return [group.seeds_text(), *(cell for which in _BOTH for cell in _two_cells(group.tested(which)))]


THRESHOLDS = (0.6, 0.7, 0.8, 0.9, 0.95)


def speed_table(comparison: Comparison, thresholds: Sequence[float] = THRESHOLDS) -> Table:
    """Outer updates and seconds of training after which validation accuracy was first at each of some values."""
    best = max((r.val_accuracy or 0.0 for g in comparison.groups for run in g.runs for r in run.epochs), default=0.0)
    # What nobody reached is said once.
    thresholds = [*(t for t in thresholds if t <= best), *[t for t in thresholds if t > best][:1]]
    columns = ["method", "", *(f"{100 * threshold:g}%" for threshold in thresholds)]
    rows = []
    for group in comparison.groups:
        reached = [[_first_at(run, threshold) for run in group.runs] for threshold in thresholds]
        rows.append([group.label, "outer updates", *(_reached_text(each, 0) for each in reached)])
        rows.append([group.label, "seconds", *(_reached_text(each, 1) for each in reached)])
    machines = {
        f"{where['device']}, {where['cores']} cores, {where['processes']} processes"
        for group in comparison.groups
        for run in group.runs
        if run.summary and (where := run.summary["environment"])
    }
    notes = ["Looked at when an epoch ends. Mean ± deviation over the seeds that reached it, with more than one."]
    if len(machines) > 1:
        notes.append("Seconds are of different machines or numbers of processes: " + "; ".join(sorted(machines)) + ".")
    elif machines:
        notes.append(f"Seconds on {machines.pop()}, validation not counted.")
    caption = f"Until validation accuracy was first at ... {comparison.caption}"
    return Table(caption, columns, rows, notes)


def _first_at(run: RunRecords, threshold: float) -> tuple[float, float] | None:
    for record in run.epochs:
        if record.val_accuracy is not None and record.val_accuracy >= threshold:
            return record.iterations, record.seconds
    return None


def _reached_text(reached: Sequence[tuple[float, float] | None], place: int) -> str:
    values = [each[place] for each in reached if each is not None]
    if not values:
        return "not reached"
    text = f"{statistics.fmean(values):,.0f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):,.0f}"
    return text if len(values) == len(reached) else f"{text} ({len(values)} of {len(reached)} seeds)"


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


def commands_table(comparison: Comparison) -> Table:
    """The command of every run that says it."""
    rows = []
    for group in comparison.groups:
        for run in group.runs:
            command = (run.summary or {}).get("command") or f"{DASH} (run folder {run.path.name}, preset {run.preset})"
            rows.append([group.label, str(run.seed), str(command)])
    return Table("Commands", ["method", "seed", "command"], rows)


def duration(seconds: float) -> str:
    """``48 s``, ``6.7 min`` or ``3.2 h``."""
    if not seconds >= 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
