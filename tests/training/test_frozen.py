"""A run of the formats' first version: still evaluated, gone on with and drawn, with what that version made of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from innerloop.cli.main import main
from innerloop.reports.records import read_run
from innerloop.training.run_folder import RunFolder

FROZEN = Path(__file__).parents[1] / "frozen"
ALONE = ["--threads", "1", "--processes", "1", "--json"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return shutil.copytree(FROZEN / "run-0.1", tmp_path / "run")


def expected() -> dict[str, Any]:
    values: dict[str, Any] = json.loads((FROZEN / "expected-0.1.json").read_text())
    return values


def same_scores(found: dict[str, Any], frozen: dict[str, Any]) -> None:
    """Up to rounding, which differs between machines and may turn a query or two of 120 over."""
    for which in ("best", "ensemble"):
        for normalisation, score in frozen[which].items():
            mine = found[which][normalisation]
            assert mine["loss"] == pytest.approx(score["loss"], rel=0.02)
            assert mine["accuracy"] == pytest.approx(score["accuracy"], abs=2.5 / 120)
            assert mine["tasks"] == score["tasks"] == 20


def test_it_is_of_the_first_version() -> None:
    """That nobody renews it by mistake."""
    config = json.loads((FROZEN / "run-0.1" / "config.json").read_text())
    assert config["version"] == 1
    assert "on_divergence" not in config["config"]["outer"]
    assert "version" not in json.loads((FROZEN / "run-0.1" / "metrics.jsonl").read_text().splitlines()[0])
    size = sum(p.stat().st_size for p in FROZEN.rglob("*") if p.is_file())
    assert size < 300_000


def test_settings_that_came_later_have_their_defaults() -> None:
    _, config = RunFolder(FROZEN / "run-0.1").read_config()
    assert config.outer.on_divergence == "stop"
    assert (config.network.filters, config.method.da_epochs) == (4, 1)


def test_it_is_evaluated(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--tasks", "20", *ALONE]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["epochs"] == expected()["evaluated"]["epochs"]
    same_scores(found["test"], expected()["evaluated"]["test"])


def test_it_goes_on_and_its_figures_are_drawn(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(run), *ALONE]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["epochs"] == 4
    assert len(summary["best_epochs"]) == 2
    # Four old lines or three of them and a new one: the reader does not mind.
    records = read_run(run).epochs
    assert [r.epoch for r in records] == [1, 2, 3, 4]
    last = expected()["last_epoch"]
    assert records[-1].train_loss == pytest.approx(last["train_loss"], rel=0.02)
    assert records[-1].gradient_norm_mean == pytest.approx(last["gradient_norm_mean"], rel=0.05)
    if summary["best_epochs"] == expected()["resumed"]["best_epochs"]:
        same_scores(summary["test"], expected()["resumed"]["test"])
    drawn = {p.name for p in (run / "figures").iterdir()}
    assert {"accuracy.png", "inner_steps.png", "rates.png", "overview.png", "task.png"} <= drawn
    kept = {p.name for p in (run / "checkpoints").iterdir()}
    assert {"latest.safetensors", "previous.safetensors"} <= kept


def test_a_config_of_a_newer_version_and_an_unknown_setting_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"version": 99}))
    assert main(["evaluate", str(run)]) == 2
    assert "version 99, of a newer innerloop" in " ".join(capsys.readouterr().err.split())
    values["config"]["outer"]["warm_up"] = 3
    path.write_text(json.dumps(values))
    assert main(["evaluate", str(run)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "does not hold a run's settings: --warm-up 3" in said


def test_metrics_of_a_newer_version_are_refused_and_unknown_fields_passed_over(run: Path) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(json.dumps(json.loads(line) | {"new": 1, "version": 2}) for line in lines))
    assert len(read_run(run).epochs) == 3
    path.write_text(json.dumps(json.loads(lines[0]) | {"version": 3}))
    with pytest.raises(ValueError, match=r"line 1 has version 3, of a newer innerloop; .* Upgrade"):
        read_run(run)
