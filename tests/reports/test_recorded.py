"""experiments/record.py: what is kept of runs, and the page that is written from what is kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from .synthetic import write_grid, write_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import record

    return record


@pytest.fixture
def results(record: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "repository" / "experiments" / "results"
    folder.mkdir(parents=True)
    monkeypatch.setattr(record, "RESULTS", folder)
    monkeypatch.setattr(record, "HERE", folder.parent)
    return folder


def test_the_page_of_results_is_that_of_the_records(record: ModuleType) -> None:
    text = record.PAGE.read_text(encoding="utf-8")
    assert text == record.results_page()
    for target in re.findall(r"\]\((\.\./.*?)\)", text):
        assert (record.PAGE.parent / target).exists(), target


def test_a_grid_is_recorded_without_checkpoints_and_figures(record: ModuleType, results: Path, tmp_path: Path) -> None:
    rows = {"maml": ("maml", {"data.data": "/somebody/data/omniglot"}), "mamlpp": ("maml_plus_plus", {})}
    grid = write_grid(tmp_path / "grid", rows, {"maml": [0.9, None], "mamlpp": [0.97, 0.98]})
    run = grid / "maml" / "seed-0"
    for name in (
        "checkpoints/latest.safetensors",
        "figures/accuracy.png",
        "figures/process.json",
        "figures/process.png",
    ):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("x")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "command": f"innerloop train --out {run}"}))
    record.record(grid, "both")
    kept = {path.relative_to(results / "both").as_posix() for path in (results / "both").rglob("*") if path.is_file()}
    every = {
        f"{row}/seed-{seed}/{name}" for row in rows for seed in (0, 1) for name in ("config.json", "metrics.jsonl")
    }
    finished = {f"{row}/summary.json" for row in ("maml/seed-0", "mamlpp/seed-0", "mamlpp/seed-1")}
    assert kept == {"grid.json", *every, *finished, *(f"maml/seed-0/figures/process.{end}" for end in ("json", "png"))}
    copied = results / "both" / "maml" / "seed-0"
    assert json.loads((copied / "config.json").read_text())["config"]["data"]["data"] == "omniglot"
    assert json.loads((copied / "summary.json").read_text())["command"] == "innerloop train --out runs/both/maml/seed-0"
    page = record.results_page()
    assert "1 of 2 (seed 1 diverged in epoch 3 of 4)" in page
    assert "97.50 ± 0.71" in page
    record.draw_figures()
    for target in re.findall(r"\]\(\.\./(.*?)\)", page):
        assert (results.parents[1] / target).exists(), target


def test_full_length_results_without_a_record_are_not_run(record: ModuleType, results: Path, tmp_path: Path) -> None:
    full = {"outer.epochs": 100, "outer.iterations": 500, "outer.meta_batch": 8}
    run = write_run(tmp_path / "run", [0.9], method="maml_plus_plus", changes=full, test=0.97)
    short = write_run(tmp_path / "short", [0.9], method="maml_plus_plus", changes={"data.ways": 5}, test=0.99)
    record.record(run, "full")
    record.record(short, "short")
    rows = [line for line in record.results_page().splitlines() if line.startswith("| Omniglot")]
    assert rows == [
        "| Omniglot 20-way 1-shot | 1 | 97.00 | ± 1.00 | 95.00 | ± 1.00 | 97.65 ± 0.05 |",
        "| Omniglot 20-way 5-shot | not run | – | – | – | – | 99.33 ± 0.03 |",
        "| Omniglot 5-way 1-shot | not run | – | – | – | – | 99.47 |",
        "| Omniglot 5-way 5-shot | not run | – | – | – | – | 99.93 |",
    ]


def test_a_run_that_has_not_finished_is_not_recorded(record: ModuleType, results: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is not a finished run"):
        record.record(write_run(tmp_path / "run", [0.5]), "run")
    assert not list(results.iterdir())
