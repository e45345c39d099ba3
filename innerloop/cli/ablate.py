"""``innerloop ablate``: train the rows of a table from several seeds, and write the table."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table

from innerloop.cli import train
from innerloop.reports.comparisons import write_grid
from innerloop.reports.page import write_report
from innerloop.training.building import build_device, build_tasks
from innerloop.training.config import PRESETS, Config, ConfigError, Count, Threads
from innerloop.training.grids import GRIDS, Cell, Row, cells, run_grid, train_arguments, write_statuses
from innerloop.training.progress import Progress
from innerloop.training.run_folder import RunFolder
from innerloop.training.trainer import InterruptedRunError
from innerloop.training.workers import available_cores


@dataclass(frozen=True)
class AblateArguments:
    """Train every row of a grid from several seeds, a run after the other or several at a time, and write its table.

    What has ended is not run again and what was stopped goes on: give the same command once more. Options of
    ``innerloop train`` (--data, --epochs, --iterations, --filters ...) may follow and hold for every row.
    """

    grid: tyro.conf.Positional[str] = "ablation"
    """Which grid (--list says which there are)."""
    preset: str | None = None
    """Task and schedule (default: the grid's, at full length)."""
    rows: tuple[str, ...] = ()
    """Only these rows."""
    seeds: tuple[Count, ...] = ()
    """Seeds (default: the grid's)."""
    out: Path | None = None
    """Folder of the grid. Default: runs/GRID-PRESET."""
    jobs: Threads = 0
    """Runs side by side, a core or more each (0: one for each core; on a GPU 1)."""
    list: bool = False
    """List grids and rows, and run nothing."""
    json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print the state of every run as JSON on standard output, and no progress."""


def run(arguments: Sequence[str]) -> int:
    """Run a grid as the command line says."""
    chosen, others = tyro.cli(AblateArguments, args=list(arguments), prog="innerloop ablate", return_unknown_args=True)
    if chosen.list:
        _list()
        return 0
    if chosen.grid not in GRIDS:
        raise ConfigError(f"there is no grid {chosen.grid!r}; there are {', '.join(GRIDS)}")
    grid = GRIDS[chosen.grid]
    preset = chosen.preset or grid.preset
    if preset not in PRESETS:
        raise ConfigError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}")
    shared = [*grid.arguments, *others]
    out = chosen.out or Path("runs") / f"{chosen.grid}-{preset}"
    runs = cells(out, _rows(grid.rows, chosen.rows), chosen.seeds or grid.seeds)
    configs = [_config(cell, preset, shared) for cell in runs]
    progress = Progress(shown=not chosen.json)
    device = build_device(configs[0])
    # The data are read once here: what is wrong with them is said now, and the runs find them decoded.
    build_tasks(configs[0], torch.device("cpu"), progress=progress.shown)
    jobs = chosen.jobs or (1 if device.type == "cuda" else available_cores())
    threads = max(1, available_cores() // jobs)
    progress.console.print(f"grid folder: {out}", highlight=False, soft_wrap=True)
    before = {id(cell): cell.epochs for cell in runs}
    with progress.task(f"{len(runs)} runs", sum(c.outer.epochs for c in configs), sum(before.values())) as bar:

        def tick() -> None:
            for cell in runs:
                done = cell.epochs
                if done > before[id(cell)]:
                    bar.advance(done - before[id(cell)], _status(runs))
                    before[id(cell)] = done
            write_statuses(out, runs)

        try:
            with _stopped_by_sigterm():
                run_grid(runs, preset, shared, jobs=jobs, threads=threads, tick=tick)
        except (KeyboardInterrupt, InterruptedRunError):
            command = shlex.join(["innerloop", "ablate", *arguments])
            progress.console.print(f"Saved. Go on with: {command}", highlight=False, soft_wrap=True)
            raise
        finally:
            write_statuses(out, runs)
    written = _write(chosen.grid, out, progress)
    bad = [cell for cell in runs if cell.status == "failed"]
    for cell in bad:
        last = cell.log.read_text(errors="replace").strip().splitlines()[-1:]
        progress.console.print(f"{cell.folder} failed: {' '.join(last)} ({cell.log})", highlight=False, soft_wrap=True)
    if chosen.json:
        states = [{"row": c.row.name, "seed": c.seed, "status": c.status, "run": str(c.folder)} for c in runs]
        print(json.dumps({"version": 1, "runs": states, "files": [str(path) for path in written]}))
    else:
        print(f"report: {out / 'report' / 'report.html'}")
    return 1 if bad else 0


def _write(grid: str, out: Path, progress: Progress) -> list[Path]:
    """The grid's tables and figures, and its report, from all its runs that have finished an epoch."""
    if not any(out.glob("*/*/metrics.jsonl")):
        return []
    with progress.waiting("drawing tables and figures"):
        return write_grid([out], out) + write_report([out], out / "report", title=GRIDS[grid].about)[1]


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block by an exception, so that the runs are told to save."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise InterruptedRunError(number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _rows(rows: Sequence[Row], wanted: Sequence[str]) -> list[Row]:
    names = {row.name: row for row in rows}
    for name in wanted:
        if name not in names:
            raise ConfigError(f"there is no row {name!r} in this grid; there are {', '.join(names)}")
    return [names[name] for name in wanted] or list(rows)


def _config(cell: Cell, preset: str, arguments: Sequence[str]) -> Config:
    """The config of a cell, found to be good and to be that of what its folder holds already."""
    config = train.configured(preset, train_arguments(cell.row, cell.seed, arguments))
    if (cell.folder / "config.json").is_file():
        _, stored = RunFolder(cell.folder).read_config()
        differences = train.differences(stored, config)
        if differences:
            raise ConfigError(
                f"{cell.folder} was run with other settings: {'; '.join(differences)}. Name another folder: --out DIR"
            )
    return config


def _status(runs: Sequence[Cell]) -> str:
    return f"{sum(c.status == 'done' for c in runs)} of {len(runs)} runs done"


def _list() -> None:
    for name, grid in GRIDS.items():
        table = Table("row", "", "options", title=f"{name}: {grid.about}", title_justify="left", box=None)
        for row in grid.rows:
            table.add_row(row.name, row.title, " ".join(["--method", row.method, *grid.arguments, *row.arguments]))
        Console().print(table)
