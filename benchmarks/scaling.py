"""How time and memory of a MAML step grow with inner steps, tasks, ways and filters.

python benchmarks/scaling.py    makes benchmarks/results/scaling.json and docs/images/scaling.png in 15 minutes
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.ticker import LogLocator

from innerloop.bench.cases import CASES, Case
from innerloop.bench.contenders import CONTENDERS
from innerloop.bench.measuring import measure
from innerloop.reports.style import BLUE, GREEN, GREY, MARKERS, ORANGE, VERMILLION, figure_at
from innerloop.training.checkpoints import write_json
from innerloop.training.environment import environment
from innerloop.training.progress import Progress
from innerloop.training.workers import available_cores

ROOT = Path(__file__).parent.parent
RESULTS, PICTURE = ROOT / "benchmarks" / "results" / "scaling.json", ROOT / "docs" / "images" / "scaling.png"
ROUNDS, WARM_UP = 3, 1

BASE = replace(CASES["omniglot-maml"], tasks=2)
AXES: dict[str, tuple[int, ...]] = {
    "inner_steps": (1, 5, 10, 20, 50),
    "tasks": (2, 4, 8, 16),
    "ways": (5, 10, 20, 40),
    "filters": (16, 32, 64, 128),
}
NAMES = ("innerloop", "innerloop, mixed mode", "innerloop, reverse mode", "higher", "torchopt")
PEERS = ("innerloop", "higher", "torchopt")
"""Measured along every axis; the others along the inner steps."""
COLOURS = dict(zip(NAMES, (BLUE, GREEN, ORANGE, VERMILLION, GREY), strict=True))


def main() -> None:
    """Measure, record, draw."""
    points: list[dict[str, Any]] = []
    cases: list[tuple[str, int, Case]] = [
        (axis, value, replace(BASE, **{axis: value})) for axis, values in AXES.items() for value in values
    ]
    progress = Progress()
    with progress.task("scaling", len(cases)) as bar:
        for axis, value, case in cases:
            names = [n for n in (NAMES if axis == "inner_steps" else PEERS) if CONTENDERS[n].installed]
            for name, m in measure(case, names, ROUNDS, WARM_UP).items():
                found = {"median": m.median, "seconds": m.seconds, "memory": m.memory, "memory_total": m.memory_total}
                points.append({"axis": axis, "value": value, "contender": name, **found})
            bar.advance(1, f"{axis} {value}")
    where = environment(torch.device("cpu"), available_cores())
    write_json(RESULTS, {"version": 1, "case": asdict(BASE), "rounds": ROUNDS, "points": points, "environment": where})
    draw()


def draw() -> None:
    """The figure of what is recorded."""
    points = json.loads(RESULTS.read_text())["points"]
    with figure_at(PICTURE, 11.0, 5.2) as figure:
        panels = figure.subplots(2, len(AXES), sharex="col", squeeze=False)
        for column, (axis, values) in enumerate(AXES.items()):
            for row, (key, unit, label) in enumerate(
                (("median", 1.0, "seconds a step"), ("memory", 1e6, "peak memory, MB"))
            ):
                panel = panels[row][column]
                for name, marker in zip(NAMES, MARKERS, strict=False):
                    line = [p for p in points if p["axis"] == axis and p["contender"] == name and p[key]]
                    y = [p[key] / unit for p in line]
                    panel.plot([p["value"] for p in line], y, color=COLOURS[name], marker=marker, label=name)
                panel.set_xscale("log", base=2)
                panel.set_yscale("log")
                panel.set_xticks(values, [str(v) for v in values])
                panel.minorticks_off()
                panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                panel.yaxis.set_major_formatter("{x:g}")
                panel.grid(alpha=0.3)
                if column == 0:
                    panel.set_ylabel(label)
                if row == 1:
                    panel.set_xlabel(axis.replace("_", " "))
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))


if __name__ == "__main__":
    main()
