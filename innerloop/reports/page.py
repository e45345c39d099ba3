"""The report of some runs: an HTML page that needs nothing else, the same as Markdown, and the figures as PNG files."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from matplotlib.axes import Axes

from innerloop.reports import comparison_panels, comparisons, run_panels
from innerloop.reports.files import write_text
from innerloop.reports.groups import Comparison, Group, find_runs
from innerloop.reports.groups import comparisons as compared
from innerloop.reports.process import read_process
from innerloop.reports.process_panel import draw_process
from innerloop.reports.records import RunRecords
from innerloop.reports.style import figure_at
from innerloop.reports.tables import (
    Table,
    ablation_table,
    accuracy_table,
    commands_table,
    differences_table,
    normalisation_table,
    per_step_table,
    runs_table,
    speed_table,
    steps_table,
)


@dataclass(frozen=True)
class Picture:
    """A PNG file and what it shows."""

    path: Path
    caption: str

    def base64(self) -> str:
        """The file, as a page embeds it."""
        return base64.b64encode(self.path.read_bytes()).decode()


@dataclass(frozen=True)
class Block:
    """A heading with what stands below it."""

    heading: str
    lines: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    side_by_side: bool = False


@dataclass(frozen=True)
class Section:
    """Runs of one task and one schedule."""

    heading: str
    schedule: str
    anchor: str
    blocks: list[Block]


@dataclass(frozen=True)
class Report:
    """All of it."""

    title: str
    lead: str
    sections: list[Section]

    def html(self) -> str:
        """One self-contained page. All text is escaped."""
        environment = Environment(
            loader=PackageLoader("innerloop.reports"), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        return environment.get_template("report.html.j2").render(report=self)

    def markdown(self, folder: Path) -> str:
        """The same for a reader of text; pictures are named relative to ``folder``."""
        lines = [f"# {self.title}", "", self.lead]
        for section in self.sections:
            lines += ["", f"## {section.heading}", "", section.schedule]
            for block in section.blocks:
                lines += ["", f"### {block.heading}"]
                for text in (*block.lines, *(table.markdown() for table in block.tables)):
                    lines += ["", text]
                for picture in block.pictures:
                    lines += ["", f"![{picture.caption}]({picture.path.relative_to(folder).as_posix()})"]
                    lines += ["", f"*{picture.caption}*"]
        return "\n".join(lines) + "\n"


def write_report(runs: Iterable[Path], out: Path, title: str = "") -> tuple[Report, list[Path]]:
    """Write the report of some runs: ``NAME.html``, ``NAME.md`` and ``NAME-figures/``.

    Args:
        runs: run folders, or folders of them at any depth. What differs in nothing but the seed is one method's; runs
            of different tasks or schedules stand in sections of their own.
        out: a folder, where NAME is ``report``; or a file ``NAME.html``.
        title: of the page. Default: the tasks.

    Returns:
        The report, and the files written: HTML, Markdown, figures.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: a damaged record.
    """
    found = find_runs(runs)
    if out.suffix.lower() in (".html", ".htm"):
        folder, name = out.parent, out.stem
        page = out
    else:
        folder, name = out, "report"
        page = folder / "report.html"
    pictures = folder / f"{name}-figures"
    sections = []
    for place, comparison in enumerate(compared(found)):
        slug = f"{place + 1}-{comparison.slug}"
        sections.append(Section(comparison.task, f"{comparison.schedule}.", slug, _blocks(comparison, pictures / slug)))
    tasks = list(dict.fromkeys(section.heading for section in sections))
    report = Report(title or f"Runs on {', '.join(tasks)}", _lead(found), sections)
    drawn = [p.path for section in sections for block in section.blocks for p in block.pictures]
    written = [
        write_text(page, report.html()),
        write_text(folder / f"{name}.md", report.markdown(folder)),
        *drawn,
    ]
    return report, written


def _lead(runs: list[RunRecords]) -> str:
    finished = sum(run.status == "finished" for run in runs)
    diverged = sum(run.status == "diverged" for run in runs)
    rest = len(runs) - finished - diverged
    parts = [f"{finished} finished"]
    parts += [f"{diverged} diverged"] if diverged else []
    parts += [f"{rest} not finished"] if rest else []
    count = f"{len(runs)} run{'s' * (len(runs) != 1)}"
    return (
        f"{count}: {', '.join(parts)}. Accuracies are on classes held out of training. A ± is named wherever it "
        "stands: a deviation over seeds is the spread of training runs, a 95% interval over tasks is how well a mean "
        "over test tasks is known. Runs of different schedules are never in one table."
    )


def _blocks(comparison: Comparison, folder: Path) -> list[Block]:
    classify = comparison.is_classification
    blocks = [_results(comparison, folder)]
    if any(group.finished for group in comparison.groups):
        tables = [normalisation_table(comparison)] if classify else []
        blocks.append(Block("Inner steps and normalisation", tables=[per_step_table(comparison), *tables]))
    blocks += _training(comparison, folder)
    blocks += _methods(comparison, folder)
    tables = [runs_table(comparison)]
    apart = differences_table(comparison)
    if apart is not None:
        tables.append(apart)
    blocks.append(Block("What was run", tables=[*tables, commands_table(comparison)]))
    return blocks


def _results(comparison: Comparison, folder: Path) -> Block:
    kinds = comparisons.fitting(comparison) if comparison.is_classification else []
    pictures = []
    tables = [accuracy_table(comparison)]
    if "ablation" in kinds:
        tables = [ablation_table(comparison)]
        path = comparisons.draw_ablation(comparison, folder / "ablation.png")
        pictures.append(Picture(path, "Each repair by itself, and all of them, beside the paper"))
    if "steps" in kinds:
        tables.append(steps_table(comparison))
        path = comparisons.draw_steps(comparison, folder / "steps.png")
        pictures.append(Picture(path, "MAML++ by its number of inner steps"))
    if "rows" in kinds:
        path = comparisons.draw_rows(comparison, folder / "rows.png")
        pictures.append(Picture(path, "Row by row, beside the paper"))
    return Block("Results", tables=tables, pictures=pictures)


def _training(comparison: Comparison, folder: Path) -> list[Block]:
    """Curves, speed and gradient norms of the groups that finished an epoch."""
    groups = [group for group in comparison.groups if any(run.epochs for run in group.runs)]
    if not groups:
        return []
    path = folder / "validation.png"
    with figure_at(path, 7.2, 4.0 + 0.2 * len(groups)) as figure:
        axes = figure.add_subplot()
        comparison_panels.curves_panel(axes, groups, legend=False)
        axes.set_title("Validation tasks over the epochs")
        handles = comparison_panels.legend_handles(groups)
        figure.legend(handles=handles, loc="outside lower center", ncols=1)
    pictures = [Picture(path, "Validation over the epochs; the legend says what each band is")]
    tables = []
    if comparison.is_classification:
        tables.append(speed_table(comparison))
        path = comparisons.draw_speed(comparison, folder / "speed.png")
        pictures.append(Picture(path, "Validation accuracy over outer updates, and over the time of training"))
    path = comparisons.draw_stability(comparison, folder / "gradient-norms.png")
    pictures.append(Picture(path, "Each method's seeds, and below them the norm of the meta-gradient"))
    return [Block("Training", tables=tables, pictures=pictures)]


def _methods(comparison: Comparison, folder: Path) -> list[Block]:
    """Of each group, one run's inner steps, inner rates, loss weights and process."""
    blocks = []
    for group in comparison.groups:
        shown = next((run for run in (*group.finished, *group.runs) if run.epochs), None)
        if shown is None:
            continue
        stem = re.sub(r"[^a-z0-9]+", "-", group.label.lower().replace("++", "pp")).strip("-")
        pictures = [
            Picture(_panel(folder / f"{stem}-{name}.png", panel, shown, size), caption)
            for name, panel, size, caption in _run_panels(shown)
        ]
        record = shown.path / "figures" / "process.json"
        if record.is_file():
            path = draw_process(folder / f"{stem}-process.png", read_process(record))
            blocks.append(
                Block(
                    f"{group.label}: one task through the inner and the outer loop",
                    pictures=[Picture(path, f"Seed {shown.seed}, best checkpoint: drawn from {record.name}")],
                )
            )
        blocks.append(Block(f"{group.label}: {_which(group, shown)}", pictures=pictures, side_by_side=True))
    return blocks


def _which(group: Group, shown: RunRecords) -> str:
    return "inner steps, rates and loss weights" + (f" (seed {shown.seed})" if len(group.runs) > 1 else "")


_PanelPlan = tuple[str, Callable[[Axes, RunRecords], None], tuple[float, float], str]


def _run_panels(run: RunRecords) -> list[_PanelPlan]:
    plans: list[_PanelPlan] = [
        ("inner-steps", run_panels.inner_steps_panel, (6.2, 4.0), "Validation after each inner step, in a few epochs"),
    ]
    rates = run.epochs[-1].rates
    if rates:
        steps = max(len(values) for values in rates.values())
        size = (min(max(3.6 + 0.55 * steps, 5.0), 14.0), min(max(1.4 + 0.22 * len(rates), 2.6), 16.0))
        plans.append(("rates", run_panels.rates_panel, size, "Inner rates at the end of training"))
    if run.msl_end is not None or any(run.epochs[0].loss_weights[:-1]):
        plans.append(("loss-weights", run_panels.msl_weights_panel, (6.8, 3.8), "Weight of each query loss (MSL)"))
    return plans


def _panel(path: Path, panel: Callable[[Axes, RunRecords], None], run: RunRecords, size: tuple[float, float]) -> Path:
    with figure_at(path, *size) as figure:
        panel(figure.add_subplot(), run)
    return path


def report_json(runs: Iterable[Path]) -> list[dict[str, Any]]:
    """The figures of the runs for a script: a comparison for each task and schedule, with its groups' statistics."""
    found = []
    for comparison in compared(find_runs(runs)):
        figure = "accuracy" if comparison.is_classification else "loss"
        groups = []
        for group in comparison.groups:
            tested = {}
            for which in ("ensemble", "best"):
                for normalisation in ("batch", "running", "support"):
                    estimate = group.tested(which, normalisation, figure)
                    tested[f"{which}_{normalisation}"] = estimate and {
                        "mean": estimate.mean,
                        "deviation_over_seeds": estimate.deviation,
                        "interval_over_tasks": estimate.interval,
                        "seeds": estimate.seeds,
                        "tasks_per_seed": estimate.tasks,
                    }
            runs_of_group = [{"run": str(r.path), "seed": r.seed, "status": r.status} for r in group.runs]
            groups.append({"method": group.label, "runs": runs_of_group, figure: tested})
        found.append({"task": comparison.task, "schedule": comparison.schedule, "groups": groups})
    return found
