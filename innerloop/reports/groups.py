"""Runs found in folders, grouped over seeds, and sorted into what may stand in one table.

>>> for comparison in comparisons(find_runs([Path("runs/ablation-omniglot-20way-1shot")])):   # doctest: +SKIP
...     print(comparison.task, comparison.schedule, [group.label for group in comparison.groups])
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from innerloop.methods import Method
from innerloop.reports import paper
from innerloop.reports.estimates import Estimate, Which, over_runs
from innerloop.reports.records import RunRecords, read_started_run, rows_of_grid

REPAIRS = ("msl", "lslr", "bnwb", "bnrs", "ca", "da")
"""MAML++'s six, in the order of the paper's table."""

Settings = Mapping[str, Any]
"""``"section.name"``: value."""

_CENTRE = "data.centre"

# Settings that say where the data lie and how a run was computed, and nothing of what was computed.
_WHERE = {
    *(f"data.{name}" for name in ("data", "download", "splits_dir", "skip_broken")),
    *(f"compute.{name}" for name in ("seed", "device", "threads", "processes", "stored_steps", "cuda_graph")),
}
# What older records do not say, since it could not be otherwise.
_DEFAULTS: dict[str, Any] = {
    _CENTRE: False,
    "compute.precision": "float32",
    **{f"method.{f.name}": f.default for f in fields(Method)},
}
_SCHEDULE = {
    *(f"outer.{name}" for name in ("epochs", "iterations", "meta_batch", "outer_lr", "clip")),
    *(f"evaluation.{name}" for name in ("val_tasks", "test_tasks", "test_steps", "ensemble")),
}


def find_runs(paths: Iterable[Path]) -> list[RunRecords]:
    """The runs at these paths and in the folders below them, in order of their paths, a grid's as in it; each once.

    A run is a folder with a ``config.json`` that ``innerloop train`` wrote. One that has not finished counts as well,
    with its status.

    Raises:
        FileNotFoundError: a path is not a folder, or there is no run in it.
        ValueError: a run's file is damaged.
    """
    found: dict[Path, RunRecords] = {}
    for path in paths:
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is not a folder: give run folders, or folders of them")
        grids = [file.parent for file in path.rglob("grid.json")]
        rows = {grid / row: place for grid in grids for place, row in enumerate(rows_of_grid(grid))}
        folders = sorted((file.parent for file in path.rglob("config.json")), key=lambda f: _natural(f, rows))
        runs = [run for run in map(read_started_run, folders) if run.config]
        if not runs:
            raise FileNotFoundError(
                f"{path} holds no run: there is no config.json of innerloop train in it or below it"
            )
        found |= {run.path.resolve(): run for run in runs}
    return list(found.values())


def _natural(path: Path, rows: Mapping[Path, int]) -> list[tuple[str, int]]:
    """Sorts seed-10 after seed-9, and rows of grids as they are there."""
    if path.parent in rows:
        return [*_natural(path.parent.parent, {}), ("", rows[path.parent]), *_natural(Path(path.name), {})]
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", str(path)) if text or number]


def settings(run: RunRecords) -> dict[str, Any]:
    """What was computed, whatever the seed and the machine: settings that have no effect in the run are left out."""
    flat = dict(_DEFAULTS)
    for section, values in run.config.items():
        if isinstance(values, Mapping):
            flat |= {f"{section}.{name}": value for name, value in values.items()}
    flat = {name: list(v) if isinstance(v, tuple) else v for name, v in flat.items() if name not in _WHERE}
    # Reverse and mixed mode are the same gradient.
    if flat.pop("compute.mode", "auto") == "first-order":
        flat["method.second_order"] = False
    unused = [
        ("method.msl", "method.msl_epochs"),
        ("method.ca", "outer.outer_lr_min"),
        ("method.da", "method.da_epochs"),
    ]
    for switch, name in unused:
        if not flat.get(switch):
            flat.pop(name, None)
    return flat


def method_label(run: Settings) -> str:
    """A method by its name in the papers: ``MAML``, ``MAML + MSL``, ``MAML++``, ``MAML++ without DA`` ..."""
    on = [repair for repair in REPAIRS if run.get(f"method.{repair}")]
    if run.get("method.meta_sgd"):
        base = "Meta-SGD"
    elif run.get("method.adapt") == ["head.*"]:
        base = "ANIL"
    elif run.get("method.adapt_except") == ["head.*"]:
        base = "BOIL"
    else:
        base = "MAML"
    if not run.get("method.second_order", True):
        base = "FOMAML" if base == "MAML" and not on else f"first-order {base}"
    if base.endswith("MAML") and len(on) >= len(REPAIRS) - 1:
        off = [repair.upper() for repair in REPAIRS if repair not in on]
        return f"{base}++" + "".join(f" without {repair}" for repair in off)
    return " + ".join([base, *(repair.upper() for repair in on)])


@dataclass(frozen=True)
class Group:
    """Runs of the same settings, one for each seed."""

    runs: tuple[RunRecords, ...]
    """In order of their seeds."""
    label: str = ""
    """The method, and what sets it apart from others of that method in the same comparison."""

    @property
    def settings(self) -> dict[str, Any]:
        """Those that all runs share."""
        return settings(self.runs[0])

    @property
    def method(self) -> str:
        """By its name in the papers."""
        return method_label(self.settings)

    @property
    def inner_steps(self) -> int:
        """K."""
        return int(self.settings["method.inner_steps"])

    @property
    def finished(self) -> tuple[RunRecords, ...]:
        """The runs that were tested."""
        return tuple(run for run in self.runs if run.status == "finished")

    def tested(self, which: Which, normalisation: str = "batch", figure: str = "accuracy") -> Estimate | None:
        """A test figure over the seeds that finished; None where it was not recorded."""
        return over_runs([run.summary for run in self.finished if run.summary], which, normalisation, figure)

    def accuracies(self, which: Which, normalisation: str = "batch") -> list[float]:
        """Of each seed that finished, a fraction."""
        found = (over_runs([run.summary], which, normalisation, "accuracy") for run in self.finished if run.summary)
        return [each.mean for each in found if each is not None]

    def seeds_text(self) -> str:
        """``3``, or ``2 of 3 (seed 1 diverged in epoch 7 of 100)``."""
        rest = [run for run in self.runs if run.status != "finished"]
        if not rest:
            return str(len(self.runs))
        return f"{len(self.finished)} of {len(self.runs)} ({'; '.join(map(ending, rest))})"

    def paper_figure(self) -> paper.PaperFigure | None:
        """What the paper has for this method, task and number of inner steps, on its network."""
        run = self.settings
        if run.get("network.network") != "conv4" or run.get("network.strided"):
            return None
        task = (run.get("data.dataset"), run.get("data.ways"), run.get("data.shots"))
        return paper.figure(task, self.method, self.inner_steps)


def ending(run: RunRecords) -> str:
    """How far a run came that did not finish: ``seed 1 diverged in epoch 7 of 100``."""
    done, planned = len(run.epochs), run.planned_epochs
    if run.status == "diverged":
        return f"seed {run.seed} diverged in epoch {done + 1} of {planned}"
    return f"seed {run.seed} not finished: {done} of {planned} epochs"


@dataclass(frozen=True)
class Comparison:
    """Groups of one task and one schedule: what may stand in one table."""

    task: str
    """``Omniglot 20-way 1-shot``."""
    schedule: str
    """``10 epochs of 40 iterations, 4 tasks each: 400 updates (reduced; the paper's are 50,000, 8 tasks each)``."""
    groups: tuple[Group, ...]

    @property
    def caption(self) -> str:
        """Task and schedule."""
        return f"{self.task}. {self.schedule}"

    @property
    def is_classification(self) -> bool:
        """Whether there are accuracies."""
        return self.groups[0].runs[0].is_classification

    @property
    def slug(self) -> str:
        """For file names."""
        run = self.groups[0].settings
        parts = (self.task, f"{run['outer.epochs']}x{run['outer.iterations']}x{run['outer.meta_batch']}")
        return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def group_runs(runs: Iterable[RunRecords]) -> list[Group]:
    """Group runs whose configs differ in nothing but the seed.

    A seed that was run twice makes a second group: two runs of one seed are no sample of seeds.
    """
    groups: dict[str, list[list[RunRecords]]] = {}
    for run in runs:
        candidates = groups.setdefault(repr(sorted(settings(run).items(), key=str)), [])
        for members in candidates:
            if run.seed not in {member.seed for member in members}:
                members.append(run)
                break
        else:
            candidates.append([run])
    return [
        Group(tuple(sorted(members, key=lambda run: run.seed)))
        for candidates in groups.values()
        for members in candidates
    ]


def comparisons(runs: Iterable[RunRecords]) -> list[Comparison]:
    """Groups sorted by task and schedule, which are never mixed in one table, each with its label."""
    sorted_groups: dict[str, list[Group]] = {}
    for group in group_runs(runs):
        key = {n: v for n, v in group.settings.items() if _sets_apart(n)}
        sorted_groups.setdefault(repr(sorted(key.items(), key=str)), []).append(group)
    found = [
        Comparison(_task_text(groups), schedule_text(groups[0].settings), tuple(_labelled(groups)))
        for groups in (sorted(groups, key=_row_order) for groups in sorted_groups.values())
    ]
    return [_told_apart(comparison, found) for comparison in found]


def _sets_apart(name: str) -> bool:
    """Whether runs that differ in this setting are of different tasks or schedules. Centring is part of a recipe."""
    return (name.startswith("data.") and name != _CENTRE) or name in _SCHEDULE


def _task_text(groups: Sequence[Group]) -> str:
    centred = all(group.settings.get(_CENTRE) for group in groups)
    return task_text(groups[0].settings) + ", centred drawings" * centred


def _row_order(group: Group) -> tuple[int, int]:
    """The order of the paper's tables; other methods after them."""
    order = paper.ABLATION_ROWS
    return (order.index(group.method) if group.method in order else len(order), group.inner_steps)


def _told_apart(comparison: Comparison, others: Sequence[Comparison]) -> Comparison:
    """With what else differs from comparisons that would read the same."""
    alike = [other for other in others if other.caption == comparison.caption]
    if len(alike) == 1:
        return comparison
    apart = differing([other.groups[0] for other in alike])
    values = {name: row[alike.index(comparison)] for name, row in apart.items()}
    words = [f"{n.split('.', 1)[1]} {v}" for n, v in values.items() if _sets_apart(n)]
    return replace(comparison, schedule=f"{comparison.schedule}; {', '.join(words)}")


def differing(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """The settings in which groups differ, and each group's value; None where a setting has no effect."""
    tables = [group.settings for group in groups]
    names = sorted({name for table in tables for name in table}, key=_setting_order)
    values = {name: [table.get(name) for table in tables] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def _setting_order(name: str) -> tuple[int, str]:
    section = name.split(".")[0]
    order = ("data", "network", "method", "outer", "evaluation", "compute")
    return (order.index(section) if section in order else len(order), name)


def _labelled(groups: Sequence[Group]) -> list[Group]:
    by_method: dict[str, list[Group]] = {}
    for group in groups:
        by_method.setdefault(group.method, []).append(group)
    labels: dict[int, str] = {}
    for method, alike in by_method.items():
        apart = differing(alike)
        for place, group in enumerate(alike):
            parts = [text for name, values in apart.items() if (text := setting_text(name, values[place]))]
            labels[id(group)] = ", ".join([method, *parts])
    taken = list(labels.values())
    return [
        replace(group, label=label if taken.count(label) == 1 else f"{label} ({_folder(group)})")
        for group in groups
        for label in [labels[id(group)]]
    ]


def _folder(group: Group) -> str:
    """The folder that tells a group from another of the same settings."""
    path = group.runs[0].path.resolve()
    return path.name if len(group.runs) == 1 and not path.name.startswith("seed-") else path.parent.name


def setting_text(name: str, value: Any) -> str:
    """A setting in a few words; empty where it is the usual one and goes without saying."""
    short = name.split(".", 1)[1]
    if name == "method.inner_steps":
        return f"{value} inner step{'s' * (value != 1)}"
    if name == "network.strided":
        return "strided convolutions" if value else "max-pooling"
    if name == _CENTRE:
        return "centred drawings" if value else ""
    if name == "network.filters":
        return f"{value} filters"
    if name == "method.zero_init":
        return f"{' '.join(value)} from zero" if value else ""
    if name == "method.inner_lr":
        return f"inner rate {value:g}"
    if name == "method.inner_rule":
        return str(value)
    if name == "method.da_epochs":
        return f"first order for {value} epoch{'s' * (value != 1)}"
    if name == "method.msl_epochs":
        return f"MSL over {value} epoch{'s' * (value != 1)}"
    if name == "compute.precision":
        return "" if value == "float32" else f"{value} convolutions"
    return "" if value is None else f"{short} {value}"


_NAMES = {"omniglot": "Omniglot", "mini-imagenet": "mini-ImageNet", "strokes": "Strokes", "sinusoid": "Sinusoid"}


def task_text(run: Settings) -> str:
    """``Omniglot 20-way 1-shot``."""
    dataset = str(run.get("data.dataset"))
    name = _NAMES.get(dataset, dataset)
    if dataset == "sinusoid":
        return f"{name} regression, {run.get('data.shots')} support points"
    split = ", split by alphabets" if run.get("data.split") == "background" and dataset == "omniglot" else ""
    return f"{name} {run.get('data.ways')}-way {run.get('data.shots')}-shot{split}"


def schedule_text(run: Settings) -> str:
    """Epochs, iterations, meta-batch, and whether that is the paper's schedule."""
    epochs, iterations, tasks = (run.get(f"outer.{n}") for n in ("epochs", "iterations", "meta_batch"))
    if not (isinstance(epochs, int) and isinstance(iterations, int)):
        return "Schedule not recorded"
    text = f"{epochs} epochs of {iterations} iterations, {tasks} tasks each: {epochs * iterations:,} outer updates"
    meta_batch = paper.META_BATCH.get(run.get("data.dataset"))
    if meta_batch is None:
        return text
    whole = paper.SCHEDULE["epochs"] * paper.SCHEDULE["iterations"]
    if {"epochs": epochs, "iterations": iterations} == paper.SCHEDULE and tasks == meta_batch:
        return f"{text} (the paper's full schedule)"
    if epochs * iterations * (tasks or 0) < whole * meta_batch:
        return f"{text} (reduced; the paper's: {whole:,}, {meta_batch} tasks each)"
    return f"{text} (not the paper's: {whole:,}, {meta_batch} tasks each)"
