"""Grids of runs: the rows of a table, each trained from several seeds.

A grid is a folder: ``GRID/ROW/seed-S`` is an ordinary run. Each run is a process of its own, so that one that fails
takes nothing with it and several can go on side by side; what has ended is not run again.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from innerloop.training.checkpoints import write_json

Status = Literal["waiting", "running", "done", "diverged", "failed"]

DIVERGED = 3
"""Exit code of ``innerloop train`` for a NaN or infinite loss."""


@dataclass(frozen=True)
class Row:
    """A line of a table: a method and the settings that make it."""

    name: str
    """Of its folder."""
    title: str
    method: str
    arguments: tuple[str, ...] = ()
    """Options of ``innerloop train``."""


@dataclass(frozen=True)
class Grid:
    """The rows of one experiment."""

    about: str
    preset: str
    rows: tuple[Row, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    arguments: tuple[str, ...] = ()
    """Options that all rows have."""


_MAML = Row("maml", "MAML", "maml")
_MAML_PLUS_PLUS = Row("mamlpp", "MAML++", "maml_plus_plus")
_ZERO_HEAD = ("--zero-init", "head.*")

ABLATION = (
    _MAML,
    Row("maml-msl", "MAML + MSL", "maml", ("--msl",)),
    Row("maml-lslr", "MAML + LSLR", "maml", ("--lslr",)),
    Row("maml-bnwb-bnrs", "MAML + BNWB + BNRS", "maml", ("--bnwb", "--bnrs")),
    Row("maml-ca", "MAML + CA", "maml", ("--ca",)),
    Row("maml-da", "MAML + DA", "maml", ("--da",)),
    Row("meta-sgd", "Meta-SGD", "meta_sgd"),
    _MAML_PLUS_PLUS,
)

GRIDS: dict[str, Grid] = {
    "ablation": Grid(
        "MAML, each repair by itself, Meta-SGD and MAML++ (the paper's table 1)", "omniglot-20way-1shot", ABLATION
    ),
    "steps": Grid(
        "MAML++ with 1 to 5 inner steps, beside five-step MAML",
        "omniglot-20way-1shot",
        (
            _MAML,
            *(
                Row(f"mamlpp-{k}", f"MAML++, {k} step{'s' * (k > 1)}", "maml_plus_plus", ("--inner-steps", str(k)))
                for k in range(1, 6)
            ),
        ),
    ),
    "strided": Grid(
        "strided convolutions instead of max-pooling, MAML and MAML++ (the paper's figure 1)",
        "omniglot-20way-1shot",
        (_MAML, _MAML_PLUS_PLUS),
        seeds=(0, 1, 2),
        arguments=("--strided",),
    ),
    "recipe": Grid(
        "what changes to the paper's recipe give, one on top of the other",
        "omniglot-20way-1shot",
        (
            _MAML_PLUS_PLUS,
            Row("centre", "centred drawings", "maml_plus_plus", ("--centre",)),
            Row("zero-head", "and a head of zeros", "maml_plus_plus", ("--centre", *_ZERO_HEAD)),
            Row(
                "second-order",
                "and second order throughout",
                "maml_plus_plus",
                ("--centre", *_ZERO_HEAD, "--da-epochs", "0"),
            ),
        ),
    ),
}
"""Every grid by its name. ``--preset`` runs its rows on another task or schedule."""


@dataclass
class Cell:
    """One run of a grid."""

    row: Row
    seed: int
    folder: Path
    status: Status = "waiting"
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """What the run printed."""
        return self.folder.parent / f"{self.folder.name}.log"

    def look(self) -> None:
        """Bring the status up to date with the folder and the process."""
        if self.process is not None:
            code = self.process.poll()
            if code is None:
                return
            self.process = None
            self.status = "done" if code == 0 else "diverged" if code == DIVERGED else "failed"
        elif (self.folder / "summary.json").is_file():
            self.status = "done"

    @property
    def epochs(self) -> int:
        """Finished epochs."""
        metrics = self.folder / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0

    def start(self, preset: str, arguments: Sequence[str], threads: int) -> None:
        """Start the run, or go on with it."""
        if (self.folder / "config.json").is_file():
            # The settings are the run's already; where it is computed, and where its data are, may have changed.
            command = ["--resume", str(self.folder), *arguments, *self.row.arguments]
        else:
            command = [preset, *train_arguments(self.row, self.seed, arguments), "--out", str(self.folder)]
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "innerloop", "train", *command, "--processes", "1", "--threads", str(threads)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.status = "running"


def train_arguments(row: Row, seed: int, arguments: Sequence[str]) -> list[str]:
    """Options of ``innerloop train`` for a row's run; a row's own come last, and count."""
    return ["--method", row.method, "--seed", str(seed), *arguments, *row.arguments]


def cells(out: Path, rows: Sequence[Row], seeds: Sequence[int]) -> list[Cell]:
    """The runs of a grid: all rows of the first seed, then all of the next, so that a table fills evenly."""
    found = [Cell(row, seed, out / row.name / f"seed-{seed}") for seed in seeds for row in rows]
    for cell in found:
        cell.look()
    return found


def run_grid(
    grid: Sequence[Cell],
    preset: str,
    arguments: Sequence[str],
    *,
    jobs: int,
    threads: int,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Run what has not ended, ``jobs`` runs at a time; ``tick`` is called about once a second.

    A run that diverged or failed keeps that status; calling again tries it again. Where the caller is interrupted the
    runs get the same signal, save, and end.
    """
    try:
        while True:
            for cell in grid:
                cell.look()
            tick()
            going = sum(cell.status == "running" for cell in grid)
            waiting = [cell for cell in grid if cell.status == "waiting"]
            if not going and not waiting:
                return
            for cell in waiting[: jobs - going]:
                cell.start(preset, arguments, threads)
            time.sleep(1.0)
    finally:
        left = [cell.process for cell in grid if cell.process is not None]
        for process in left:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in left:
            process.wait()


def write_statuses(out: Path, grid: Sequence[Cell]) -> None:
    """``grid.json``: what became of each run."""
    out.mkdir(parents=True, exist_ok=True)
    runs = [{"row": c.row.name, "title": c.row.title, "seed": c.seed, "status": c.status} for c in grid]
    write_json(out / "grid.json", {"version": 1, "runs": runs})
