"""Resident memory over 10,000 updates of a small real run.

python benchmarks/memory.py              writes benchmarks/results/memory.json and docs/images/memory.png
python benchmarks/memory.py --figure     draws the recorded figure again

The run is MAML++ on sinusoids with all that a run does: validation and a checkpoint after each of 20 epochs, a saved
state every second, its records, and the test. The network is small, so that whatever is kept of an update shows.
"""

from __future__ import annotations

import json
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from innerloop.reports.style import BLUE, GREY, figure_at, tidy
from innerloop.training import trainer
from innerloop.training.checkpoints import write_json
from innerloop.training.config import PRESETS, Config
from innerloop.training.environment import environment
from innerloop.training.progress import Bar, Progress
from innerloop.training.run_folder import RunFolder

HERE = Path(__file__).parent
RESULTS, FIGURE = HERE / "results" / "memory.json", HERE.parent / "docs" / "images" / "memory.png"
EPOCHS, ITERATIONS, EVERY = 20, 500, 50
WARM = 1000
"""Updates after which nothing should grow: both derivative orders of DA and all stages of MSL have been seen."""


def config() -> Config:
    """The run."""
    base = PRESETS["sinusoid"].config("maml_plus_plus")
    return replace(
        base,
        method=replace(base.method, inner_steps=2, msl_epochs=1, da_epochs=1),
        outer=replace(base.outer, epochs=EPOCHS, iterations=ITERATIONS, meta_batch=2),
        evaluation=replace(base.evaluation, val_tasks=10, test_tasks=10, test_steps=2),
        compute=replace(base.compute, device="cpu", threads=1, processes=1),
    )


def resident() -> float:
    """Megabytes (10^6 bytes) of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


class Recording(Progress):
    """Notes the resident memory every so many updates."""

    def __init__(self) -> None:
        super().__init__()
        self.updates, self.megabytes = 0, list[tuple[int, float]]()

    @contextmanager
    def task(self, name: str, total: int, completed: int = 0) -> Iterator[Bar]:
        """A bar that also counts updates."""
        recording = self
        with super().task(name, total, completed) as bar:

            class Counted(Bar):
                def advance(self, steps: int = 1, status: str = "") -> None:
                    bar.advance(steps, status)
                    if name.startswith("epoch"):
                        recording.updates += steps
                        if recording.updates % EVERY == 0:
                            recording.megabytes.append((recording.updates, round(resident(), 3)))

            yield Counted(None)


def measure() -> None:
    """Train, and write the record."""
    trainer.SAVE_EVERY_SECONDS = 1.0
    recording, started = Recording(), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(Path(scratch) / "run")
        trainer.train(folder, "sinusoid", config(), recording)
        files = {p.name: p.stat().st_size for p in sorted(folder.path.rglob("*")) if p.is_file()}
    late = [m for n, m in recording.megabytes if n >= WARM]
    record = {
        "version": 1,
        "updates": recording.updates,
        "after_updates": WARM,
        "megabytes_then": late[0],
        "megabytes_at_the_end": late[-1],
        "growth_megabytes": round(late[-1] - late[0], 3),
        "most_megabytes": max(late),
        "seconds": round(time.monotonic() - started),
        "files": files,
        "megabytes": recording.megabytes,
        "environment": environment(torch.device("cpu"), 1),
    }
    write_json(RESULTS, record)
    print(f"{record['updates']} updates, growth {record['growth_megabytes']} MB after the first {WARM}")


def draw() -> None:
    """The figure of the record."""
    record = json.loads(RESULTS.read_text())
    updates, megabytes = zip(*record["megabytes"], strict=True)
    with figure_at(FIGURE, 6.4, 3.2) as figure:
        axes = figure.add_subplot()
        axes.plot(updates, megabytes, color=BLUE)
        axes.axvline(record["after_updates"], color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_ylim(0, 1.25 * max(megabytes))
        axes.set_xlim(0, record["updates"])
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("outer updates")
        axes.set_ylabel("resident memory (MB)")
        span = f"update {record['after_updates']:,} to {updates[-1]:,}"
        axes.set_title(f"{record['growth_megabytes']:+.1f} MB from {span}")
        tidy(axes)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--figure"]):
        raise SystemExit(__doc__)
    if platform.system() != "Linux":
        raise SystemExit("resident memory is read from /proc: this needs Linux")
    if not sys.argv[1:]:
        measure()
    draw()
