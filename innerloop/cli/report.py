"""``innerloop report``: a page of tables and figures from recorded runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from innerloop.reports.page import report_json, write_report
from innerloop.training.config import ConfigError
from innerloop.training.progress import Progress


@dataclass(frozen=True)
class ReportArguments:
    """Write one self-contained HTML page about some runs, the same as Markdown, and the figures as PNG files.

    What differs in nothing but the seed is grouped. Runs of different tasks or schedules get tables of their own. Runs
    that have not finished are shown as such.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or folders of them at any depth, such as a grid of innerloop ablate."""
    out: Path | None = None
    """A folder, or a file NAME.html (default: RUN/report of a single RUN, else the folder report)."""
    title: str = ""
    """Of the page."""
    json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print the figures and the files written as JSON on standard output, and no progress."""


def run(arguments: Sequence[str]) -> int:
    """Write the report as the command line says."""
    chosen = tyro.cli(ReportArguments, args=list(arguments), prog="innerloop report")
    if not chosen.runs:
        raise ConfigError("give at least one run: innerloop report RUN...")
    out = chosen.out or (chosen.runs[0] / "report" if len(chosen.runs) == 1 else Path("report"))
    if out.is_file() and out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {out} is a file: name a folder, or a file that ends in .html")
    progress = Progress(shown=not chosen.json)
    with progress.waiting("drawing figures and tables"):
        _, written = write_report(chosen.runs, out, chosen.title)
    if chosen.json:
        record = {"version": 1, "html": str(written[0]), "markdown": str(written[1])}
        print(json.dumps({**record, "figures": [str(p) for p in written[2:]], "comparisons": report_json(chosen.runs)}))
    else:
        print(f"report: {written[0]}")
    return 0
