"""Keep runs' records in the repository, and quote them in the README and in docs/results.md.

python experiments/record.py RUN NAME    copy a finished run, or a grid, to experiments/results/NAME, and quote it
python experiments/record.py             quote what is recorded
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from innerloop.reports import comparisons as draw
from innerloop.reports import paper
from innerloop.reports.files import write_text
from innerloop.reports.groups import Comparison, Group, comparisons, find_runs, method_label, settings, task_text
from innerloop.reports.records import RunRecords, read_started_run
from innerloop.reports.tables import (
    DASH,
    NOT_RUN,
    Table,
    ablation_table,
    accuracy_table,
    normalisation_table,
    per_step_table,
    speed_table,
    steps_table,
)

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
PAGE = HERE.parent / "docs" / "results.md"
BEGIN, END = "<!-- results: python experiments/record.py -->", "<!-- end of results -->"

NOT_KEPT = ("checkpoints", "report", "report-figures", "report.*", "*.log")
OF_A_GRIDS_RUN = ("config.json", "metrics.jsonl", "summary.json", "figures/process.json", "figures/process.png")


def record(source: Path, name: str) -> None:
    """Copy what is small of a finished run, all but its checkpoints; of a grid, every run's records without figures.

    Where the data lay is a matter of the machine it ran on: of that path only the last part is kept, and nothing of
    where the run lay.
    """
    target = RESULTS / name
    if (source / "config.json").is_file():
        if not (source / "summary.json").is_file():
            raise SystemExit(f"{source} is not a finished run: it has no summary.json")
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*NOT_KEPT))
        _strip_paths(target, source.resolve(), name)
        return
    runs = find_runs([source])
    about = _about(target)
    shutil.rmtree(target, ignore_errors=True)
    for run in runs:
        folder = target / run.path.relative_to(source)
        for part in OF_A_GRIDS_RUN:
            if (run.path / part).is_file():
                (folder / part).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(run.path / part, folder / part)
        _strip_paths(folder, source.resolve(), name)
    pictures = [path for _, path in process_pictures()]
    for path in sorted(target.rglob("process.png")):
        if path not in pictures:  # two are shown; the others can be drawn from process.json
            path.unlink()
    for file in sorted(source.rglob("grid.json")):
        shutil.copyfile(file, target / file.relative_to(source))
    if about:
        write_text(target / "about.md", about)


def _about(folder: Path) -> str:
    """What a person wrote of a record: its about.md, which stands under its heading and outlives a new recording."""
    file = folder / "about.md"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _strip_paths(folder: Path, source: Path, name: str) -> None:
    data = json.loads((folder / "config.json").read_text())["config"]["data"]["data"]
    for file in (folder / "config.json", folder / "summary.json"):
        if file.is_file():
            text = file.read_text()
            text = text.replace(data, Path(data).name) if data else text
            file.write_text(text.replace(str(source), f"runs/{name}"))


def quoted() -> str:
    """The README's tables: a row for each recorded run."""
    runs = [(path.parent, json.loads(path.read_text())) for path in sorted(RESULTS.glob("*/summary.json"))]
    configs = {folder: json.loads((folder / "config.json").read_text())["config"] for folder, _ in runs}
    classification = [(f, s) for f, s in runs if configs[f]["data"]["dataset"] != "sinusoid"]
    regression = [(f, s) for f, s in runs if configs[f]["data"]["dataset"] == "sinusoid"]
    lines = [
        "| run | task | method | updates x tasks | training | test tasks | transductive: best, ensemble "
        "| inductive: running, support |",
        "|---|---|---|---|---|---|---|---|",
        *(_classification_row(f, s, configs[f]) for f, s in classification),
        "",
        "Regression: mean squared error after a number of inner steps.",
        "",
        "| run | method | test tasks | support points | before | 1 step | 10 steps |",
        "|---|---|---|---|---|---|---|",
        *(_regression_row(f, s, configs[f]) for f, s in regression),
    ]
    machines = {
        f"{s['environment']['device']}, {s['environment']['cores']} cores, torch {s['environment']['torch']}"
        for _, s in runs
    }
    lines += ["", f"One seed each. Machine: {'; '.join(sorted(machines))}."]
    return "\n".join(lines)


def _classification_row(folder: Path, summary: dict[str, Any], config: dict[str, Any]) -> str:
    data, test = config["data"], summary["test"]
    best, ensemble = test["best"], test["ensemble"]
    cells = [
        f"[{folder.name}](experiments/results/{folder.name})",
        f"{data['dataset']} {data['ways']}-way {data['shots']}-shot",
        _method(folder),
        f"{summary['iterations']} x {config['outer']['meta_batch']}",
        f"{summary['train_seconds'] / 60:.1f} min",
        str(best["batch"]["tasks"]),
        f"{_percent(best['batch'])}, {_percent(ensemble['batch'])}",
        ", ".join(_percent(best[name]) for name in ("running", "support") if name in best),
    ]
    return f"| {' | '.join(cells)} |"


def _regression_row(folder: Path, summary: dict[str, Any], config: dict[str, Any]) -> str:
    steps = summary["test"]["per_step"]
    cells = [
        f"[{folder.name}](experiments/results/{folder.name})",
        _method(folder),
        str(summary["test"]["best"]["batch"]["tasks"]),
        str(config["data"]["shots"]),
        *(f"{steps[k]['loss']:.3f} ± {steps[k]['interval']:.3f}" for k in (0, 1, 10)),
    ]
    return f"| {' | '.join(cells)} |"


def _method(folder: Path) -> str:
    return method_label(settings(read_started_run(folder)))


def _percent(score: dict[str, Any]) -> str:
    return f"{100 * score['accuracy']:.2f} ± {100 * score['interval']:.2f}%"


def quote(text: str) -> str:
    """The README's text with the tables of today's records."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{quoted()}\n{END}{after}"


@dataclass(frozen=True)
class Item:
    """Something under a heading of docs/results.md: tables, and figures that are drawn from the same records."""

    tables: list[Table] = field(default_factory=list)
    figures: list[tuple[Path, str, Callable[[Path], Path] | None]] = field(default_factory=list)
    """Where it lies, what it shows, and what draws it; None for one that was recorded with its run."""

    def lines(self) -> list[str]:
        """As Markdown."""
        lines: list[str] = []
        for table in self.tables:
            lines += ["", table.markdown()]
        for path, caption, _ in self.figures:
            lines += ["", f"![{caption}](../{path.relative_to(HERE.parent).as_posix()})"]
        return lines


def grids() -> list[Path]:
    """Folders of recorded runs."""
    folders = [folder for folder in sorted(RESULTS.iterdir()) if not (folder / "config.json").exists()]
    return [folder for folder in folders if any(folder.rglob("config.json"))]


def stranger_lines() -> list[str]:
    """The table of what ``experiments/stranger.py`` recorded."""
    lines = [
        "",
        "## A stranger's classes",
        "",
        "`python experiments/stranger.py RUN --data OMNIGLOT`: characters of Omniglot's evaluation alphabets that the "
        "run has not seen, as folders of image files: adapted to the given drawings of each, and all other drawings "
        "told. An image's answer depends on nothing but itself (`support`). A ± is the 95% interval over draws of "
        "characters, or over tasks. The meta-test is of the run's own data, in the same setting.",
        "",
        "| run | trained on | ways, shots | accuracy | draws | meta-test |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted((RESULTS / "stranger").glob("*.json")):
        record = json.loads(path.read_text())
        tested = record["meta_test"]
        cells = [
            record["run"],
            record["trained_on"],
            f"{record['ways']}-way {record['shots']}-shot",
            f"{100 * record['accuracy']:.2f} ± {100 * record['interval']:.2f}%",
            str(record["draws"]),
            "–"
            if tested is None
            else f"{100 * tested['accuracy']:.2f} ± {100 * tested['interval']:.2f}% ({tested['tasks']} tasks)",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines if len(lines) > 7 else []


def results_page() -> str:
    """The text of docs/results.md."""
    singles = _single_runs()
    lines = [
        "# Recorded results",
        "",
        "Written by `python experiments/record.py` from the records in [experiments/results](../experiments/results), "
        "where each run's command, commit, hardware and metrics are. Accuracies are on classes held out of training. A "
        "± is a deviation over seeds or a 95% interval over tasks, and says which. Runs of different schedules are "
        "never in one table.",
        "",
        "## The paper's experiments at full length",
        "",
        full_length_table(find_runs([RESULTS])).markdown(),
    ]
    lines += stranger_lines()
    for grid in grids():
        lines += ["", f"## {grid.name}", "", *_about(grid).splitlines()]
        lines += ["", f"Records: [experiments/results/{grid.name}](../experiments/results/{grid.name})."]
        for item in grid_items(grid):
            lines += item.lines()
    lines += ["", "## Single runs"]
    for comparison in comparisons(singles):
        lines += ["", f"### {comparison.task}, {comparison.schedule.split(': ', 1)[-1]}"]
        tables = [accuracy_table(comparison), per_step_table(comparison)]
        if comparison.is_classification:
            tables.append(normalisation_table(comparison))
        lines += Item(tables).lines()
        names = [run.path.name for group in comparison.groups for run in group.runs]
        links = ", ".join(f"[{name}](../experiments/results/{name})" for name in names)
        lines += ["", f"Records: {links}."]
    pictures = process_pictures()
    if pictures:
        lines += ["", "## One task, through the inner and the outer loop"]
        for run, path in pictures:
            label = method_label(settings(run))
            caption = f"{label}: {task_text(settings(run))}, seed {run.seed}"
            lines += ["", f"![{caption}](../{path.relative_to(HERE.parent).as_posix()})", "", f"{caption}."]
    return "\n".join(lines) + "\n"


def full_length_table(runs: list[RunRecords]) -> Table:
    """MAML++ on Omniglot under the paper's whole schedule beside the paper's figures; what has no record is not run."""
    rows = []
    full = [c for c in comparisons(runs) if c.schedule.endswith("(the paper's full schedule)")]
    for ways in (20, 5):
        for shots in (1, 5):
            theirs = paper.FIGURES["omniglot", ways, shots]["MAML++"]
            found = [group for c in full for group in c.groups if _is(group, ways, shots) and group.finished]
            for group in found:
                cells = accuracy_table(Comparison("", "", (group,))).rows[0][1:-1]
                rows.append([f"Omniglot {ways}-way {shots}-shot", *cells, theirs.text()])
            if not found:
                rows.append([f"Omniglot {ways}-way {shots}-shot", NOT_RUN, *[DASH] * 4, theirs.text()])
    columns = [
        "MAML++, 100 epochs of 500 iterations, 8 tasks each",
        "seeds",
        "ensemble, %: mean ± deviation over seeds",
        "95% interval over tasks",
        "best checkpoint, %: mean ± deviation over seeds",
        "95% interval over tasks",
        "paper, %: mean ± deviation over seeds",
    ]
    return Table("", columns, rows, ["Transductive, as the paper's figures are."])


def _is(group: Group, ways: int, shots: int) -> bool:
    run = group.settings
    task = (run.get("data.dataset"), run.get("data.ways"), run.get("data.shots"))
    return task == ("omniglot", ways, shots) and group.method == "MAML++" and group.paper_figure() is not None


def _speed_table(comparison: Comparison) -> Table:
    return speed_table(draw.against_maml(comparison))


def _draw_speed(comparison: Comparison, path: Path) -> Path:
    return draw.draw_speed(draw.against_maml(comparison), path)


KINDS: dict[str, tuple[Callable[[Comparison], Table] | None, Callable[[Comparison, Path], Path], str]] = {
    "ablation": (ablation_table, draw.draw_ablation, "Each repair by itself"),
    "steps": (steps_table, draw.draw_steps, "By the number of inner steps"),
    "rows": (None, draw.draw_rows, "Row by row"),
    "stability": (None, draw.draw_stability, "Every seed, and the norm of the meta-gradient"),
    "speed": (_speed_table, _draw_speed, "Over outer updates, and over the time of training"),
}
"""What draws each kind of figure, the table beside it, and what it shows."""


def grid_items(grid: Path) -> list[Item]:
    """The tables and figures of a recorded grid, by what was run in it."""
    items = []
    for comparison in comparisons(find_runs([grid])):
        place = grid / "figures"
        if not comparison.is_classification:
            items.append(Item([accuracy_table(comparison)]))
            continue
        kinds = draw.fitting(comparison)
        tables = [accuracy_table(comparison)] if not {"steps", "ablation"} & set(kinds) else []
        figures = []
        for kind in kinds:
            table, function, caption = KINDS[kind]
            tables += [] if table is None else [table(comparison)]
            figures.append((place / f"{kind}-{comparison.slug}.png", caption, _drawing(function, comparison)))
        items.append(Item([*tables, normalisation_table(comparison)], figures))
    return items


def _drawing(function: Callable[[Comparison, Path], Path], comparison: Comparison) -> Callable[[Path], Path]:
    return lambda path: function(comparison, path)


def _single_runs() -> list[RunRecords]:
    return [read_started_run(path.parent) for path in sorted(RESULTS.glob("*/config.json"))]


def process_pictures() -> list[tuple[RunRecords, Path]]:
    """The first recorded picture of MAML's process and of MAML++'s, single runs before those of grids."""
    found: dict[str, tuple[RunRecords, Path]] = {}
    for run in [*_single_runs(), *find_runs([RESULTS])]:
        path, label = run.path / "figures" / "process.png", method_label(settings(run))
        if path.is_file() and label in ("MAML", "MAML++"):
            found.setdefault(label, (run, path))
    return [found[label] for label in ("MAML", "MAML++") if label in found]


def draw_figures() -> None:
    """Draw the figures of docs/results.md that are of several runs."""
    for grid in grids():
        for item in grid_items(grid):
            for path, _, function in item.figures:
                if function is not None:
                    function(path)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        record(Path(sys.argv[1]), sys.argv[2])
    elif len(sys.argv) != 1:
        raise SystemExit(__doc__)
    draw_figures()
    write_text(README, quote(README.read_text(encoding="utf-8")))
    write_text(PAGE, results_page())
