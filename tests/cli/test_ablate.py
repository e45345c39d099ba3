"""``innerloop ablate``: what is run, what is not run again, and what it says of bad input."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pytest
from PIL import Image

from innerloop.cli.ablate import run
from innerloop.cli.main import main
from innerloop.training.config import ConfigError
from innerloop.training.grids import ABLATION, GRIDS

TINY = [
    "--filters",
    "4",
    "--epochs",
    "2",
    "--iterations",
    "2",
    "--val-tasks",
    "2",
    "--test-tasks",
    "2",
    "--meta-batch",
    "1",
]
TINY += ["--inner-steps", "2"]
IMAGES = ["--data", "images", "--ways", "2", "--queries", "1", "--image-size", "16"]
GRID = ["ablation", "--preset", "folder", *IMAGES, "--rows", "maml", "mamlpp", "--jobs", "2", *TINY]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with images of ten classes."""
    monkeypatch.chdir(tmp_path)
    for c in range(10):
        folder = tmp_path / "images" / str(c)
        folder.mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (16, 16), (25 * c, 100 * i, 0)).save(folder / f"{i}.png")


@pytest.fixture
def _in_this_process(monkeypatch: pytest.MonkeyPatch, _no_figures: None) -> None:
    """A grid's runs are trained when they are started, without a process, whose start takes longer than they do."""

    class Ended:
        def __init__(self, command: list[str], stdout: BinaryIO, **options: object) -> None:
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                self.code = main(command[command.index("innerloop") + 1 :])
            stdout.write(said.getvalue().encode())

        def poll(self) -> int:
            return self.code

    stand_in = SimpleNamespace(Popen=Ended, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr("innerloop.training.grids.subprocess", stand_in)


@pytest.mark.usefixtures("_in_this_process")
def test_rows_are_trained_once_and_a_seed_more_is_added(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", *GRID, "--seeds", "0", "--out", "grid", "--json"]) == 0
    states = json.loads(capsys.readouterr().out)["runs"]
    assert [(s["row"], s["seed"], s["status"]) for s in states] == [("maml", 0, "done"), ("mamlpp", 0, "done")]
    config = json.loads(Path("grid/maml/seed-0/config.json").read_text())["config"]
    assert not config["method"]["msl"]
    assert config["network"]["filters"] == 4
    written = Path("grid/maml/seed-0/summary.json").stat().st_mtime_ns

    assert main(["ablate", *GRID, "--seeds", "0", "1", "--out", "grid", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    states = result["runs"]
    assert {Path(p).name for p in result["files"]} >= {"results.md", "speed.png", "report.html"}
    assert all(Path(p).is_file() for p in result["files"])
    assert "| MAML | 2 |" in Path("grid/results.md").read_text()
    assert len(states) == 4
    assert {s["status"] for s in states} == {"done"}
    assert Path("grid/maml/seed-0/summary.json").stat().st_mtime_ns == written
    assert json.loads(Path("grid/mamlpp/seed-1/config.json").read_text())["config"]["compute"]["seed"] == 1
    runs = json.loads(Path("grid/grid.json").read_text())["runs"]
    assert {(r["row"], r["seed"]) for r in runs} == {(row, s) for row in ("maml", "mamlpp") for s in (0, 1)}

    with pytest.raises(ConfigError, match=r"grid/maml/seed-0 was run with other settings: .*--filters was 4, not 5"):
        run([*GRID, "--filters", "5", "--seeds", "0", "--out", "grid", "--json"])


@pytest.mark.usefixtures("_in_this_process")  # when it goes on; what is stopped has processes
def test_a_stopped_grid_goes_on() -> None:
    command = [sys.executable, "-m", "innerloop", "ablate", *GRID, "--epochs", "12", "--seeds", "0", "--out", "grid"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"})
    metrics = Path("grid/maml/seed-0/metrics.jsonl")
    deadline = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert "Go on with: innerloop ablate ablation" in said
    before = metrics.read_text().splitlines()
    assert 0 < len(before) < 12
    assert not Path("grid/maml/seed-0/summary.json").exists()

    assert main(["ablate", *GRID, "--epochs", "12", "--seeds", "0", "--out", "grid", "--json"]) == 0
    assert metrics.read_text().splitlines()[: len(before)] == before
    assert Path("grid/maml/seed-0/summary.json").exists()


@pytest.mark.usefixtures("_in_this_process")
def test_a_row_of_mini_imagenet_runs_on_generated_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "experiments"))
    generated = importlib.import_module("generated_mini_imagenet")
    generated.write(Path("pictures"), "lists", images=16)
    source = ["--preset", "mini-imagenet-5way-1shot", "--data", "pictures", "--rows", "mamlpp-1", "--seeds", "0"]
    assert main(["ablate", "steps", *source, *TINY, "--out", "grid", "--json"]) == 0
    test = json.loads(Path("grid/mamlpp-1/seed-0/summary.json").read_text())["test"]
    assert test["best"]["batch"]["tasks"] == 2
    assert "mini-ImageNet 5-way 1-shot" in Path("grid/results.md").read_text()


def test_the_rows_are_those_of_the_paper() -> None:
    """Each row of the ablation switches on its own repairs, as the config that it trains says."""
    from innerloop.cli.train import configured
    from innerloop.training.grids import train_arguments

    switched = {}
    for row in ABLATION:
        method = configured("omniglot-20way-1shot", train_arguments(row, 0, [])).method
        switches = ("msl", "da", "bnrs", "bnwb", "lslr", "ca", "meta_sgd")
        switched[row.title] = {s for s in switches if getattr(method, s)}
    assert switched == {
        "MAML": set(),
        "MAML + MSL": {"msl"},
        "MAML + LSLR": {"lslr"},
        "MAML + BNWB + BNRS": {"bnwb", "bnrs"},
        "MAML + CA": {"ca"},
        "MAML + DA": {"da"},
        "Meta-SGD": {"meta_sgd"},
        "MAML++": {"msl", "da", "bnrs", "bnwb", "lslr", "ca"},
    }


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_is_valid(grid: str) -> None:
    from innerloop.cli.train import configured
    from innerloop.training.grids import train_arguments

    configs = [
        configured(GRIDS[grid].preset, train_arguments(row, 0, GRIDS[grid].arguments)) for row in GRIDS[grid].rows
    ]
    assert len({str(c) for c in configs}) == len(configs)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["abalation"], "there is no grid 'abalation'; there are ablation, steps"),
        (["ablation", "--preset", "omniglut"], "there is no preset 'omniglut'"),
        (["ablation", "--preset", "quickstart", "--rows", "mam"], "there is no row 'mam' in this grid; there are maml"),
        (["ablation", "--preset", "quickstart", "--epochs", "0"], "--epochs 0"),
        (["ablation", "--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ablate", *arguments]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not Path("runs").exists()
