"""``innerloop diagnose`` on small runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from innerloop.cli.main import main
from innerloop.training.run_folder import RunFolder

FROZEN = Path(__file__).parents[1] / "frozen" / "run-0.1"
SINUSOID = (
    "train sinusoid --epochs 3 --iterations 20 --meta-batch 4 --val-tasks 3 --test-tasks 3 --test-steps 1 "
    "--threads 1 --processes 1 --quiet --out"
)


def diagnosed(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["diagnose", str(folder), "--tasks", "4", "--threads", "1", "--json", *options]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_healthy_run(capsys: pytest.CaptureFixture[str]) -> None:
    found = diagnosed(capsys, FROZEN)
    assert found["findings"] == []
    assert found["epoch"] == 2
    assert len(found["seen"]["support_losses"]) == 3
    assert main(["diagnose", str(FROZEN), "--tasks", "2", "--threads", "1"]) == 0
    assert "nothing odd was found" in capsys.readouterr().out


def test_a_run_with_an_inner_rate_of_nearly_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SINUSOID.split(), str(tmp_path / "run"), "--inner-lr", "1e-5"]) == 0
    findings = diagnosed(capsys, tmp_path / "run")["findings"]
    assert findings[0]["kind"] == "inner rates too small"
    assert "--inner-lr" in findings[0]["remedy"]
    assert main(["diagnose", str(tmp_path / "run"), "--tasks", "2", "--threads", "1"]) == 0
    assert "1. inner rates too small" in capsys.readouterr().out


def with_history(folder: Path, losses: list[float], events: list[str]) -> Path:
    RunFolder(folder).path.mkdir()
    (folder / "config.json").write_text((FROZEN / "config.json").read_text())
    lines = [{"epoch": i + 1, "iterations": 5, "train_loss": loss} for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{half a li")
    (folder / "events.jsonl").write_text("".join(json.dumps({"event": e}) + "\n" for e in events))
    return folder


@pytest.mark.parametrize(
    ("losses", "events", "kind"),
    [
        ([1.5, 1.5, 1.5, 1.499], [], "the training loss stays"),
        ([1.5, 0.7, 0.6, 1.4], [], "the training loss rises"),
        ([1.5, 1.0, 0.8], ["resumed", "diverged"], "training diverged"),
    ],
)
def test_what_a_runs_history_says(
    losses: list[float], events: list[str], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = diagnosed(capsys, with_history(tmp_path / "run", losses, events))
    assert found["epoch"] == 0  # no checkpoint: the initial weights
    assert kind in [finding["kind"] for finding in found["findings"]]
    fine = diagnosed(capsys, with_history(tmp_path / "fine", [1.5, 1.0, 0.8], ["resumed"]))
    assert kind not in [finding["kind"] for finding in fine["findings"]]


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["diagnose", str(FROZEN), "--tasks", "0"]) == 2
    assert "--tasks" in capsys.readouterr().err
