"""Where a run was computed is its machine's business: on another it is evaluated, adapted, reported and resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_runs import StoppingProgress, small, start

import innerloop
from innerloop.cli.main import main
from innerloop.methods import maml_plus_plus
from innerloop.training.checkpoints import load_checkpoint, save_checkpoint
from innerloop.training.config import Config, DataConfig, NetworkConfig
from innerloop.training.progress import Progress
from innerloop.training.run_folder import RunFolder
from innerloop.training.trainer import InterruptedRunError, train

ELSEWHERE = {"device": "cuda:1", "precision": "tf32", "threads": 16, "processes": 0, "mode": "mixed", "stored_steps": 0}
"""Compute settings of a machine that is not this one."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = start(tmp_path_factory.mktemp("finished") / "run", small())
    train(folder, "sinusoid", small(), Progress(shown=False))
    return folder.path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def computed(run: Path, settings: dict[str, Any]) -> Path:
    """The run with other compute settings in its config."""
    record = json.loads((run / "config.json").read_text())
    record["config"]["compute"] |= settings
    (run / "config.json").write_text(json.dumps(record))
    return run


def published(run: Path) -> Path:
    """The run without the state that training would go on from."""
    for name in ("latest", "previous"):
        (run / "checkpoints" / f"{name}.safetensors").unlink(missing_ok=True)
    return run


def evaluated(capsys: pytest.CaptureFixture[str], run: Path, *more: str) -> dict[str, Any]:
    assert main(["evaluate", str(run), "--tasks", "4", "--json", *more]) == 0
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert record == json.loads((run / "evaluation.json").read_text())
    record.pop("environment")
    return record


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said of arguments that are refused."""
    assert main(arguments) == 2
    return " ".join(capsys.readouterr().err.split())


def test_a_gpus_run_is_evaluated_on_a_cpu_as_one_of_a_cpu(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = evaluated(capsys, run)
    assert here["precision"] == "float32"
    assert evaluated(capsys, computed(run, ELSEWHERE)) == here
    assert "--precision tf32 is a GPU's" in said(capsys, "evaluate", str(run), "--precision", "tf32", "--device", "cpu")
    assert main(["report", str(run), "--out", str(run.parent / "report")]) == 0


def test_evaluations_precision_is_its_own(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(
        data=DataConfig(train_classes=20),
        network=NetworkConfig(filters=8),
        method=maml_plus_plus(inner_steps=2),
    )
    run = make_run(tmp_path / "run", config)
    exact = evaluated(capsys, run)
    assert evaluated(capsys, computed(run, {"precision": "bf16"})) == exact
    rounded = evaluated(capsys, run, "--precision", "bf16")
    assert rounded["precision"] == "bf16"
    assert rounded["test"] != exact["test"]


def test_a_gpus_run_is_adapted_on_a_cpu_as_one_of_a_cpu(
    make_run: Callable[..., Path], shapes: Callable[..., Image.Image], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    support = {kind: [shapes(kind, 0)] for kind in ("bar", "dot")}
    asked = [shapes(kind, n) for kind in ("bar", "dot") for n in (1, 2)]

    def probabilities() -> torch.Tensor:
        return innerloop.load(run).adapt(support).probabilities(asked)

    here = probabilities()
    for settings in (ELSEWHERE, {**ELSEWHERE, "precision": "bf16"}):
        computed(run, settings)
        assert torch.equal(probabilities(), here)


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"precision": "tf32"}, ["--precision", "float32"]),
        ({"device": "cuda:77"}, ["--device", "auto"]),
    ],
)
def test_going_on_elsewhere_says_which_option_to_give(
    settings: dict[str, Any], option: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = start(tmp_path / "run", small())
    with pytest.raises(InterruptedRunError):
        train(folder, "sinusoid", small(), StoppingProgress(9))
    computed(folder.path, {"device": "cpu", **settings})
    assert " ".join(option) in said(capsys, "train", "--resume", str(folder.path))
    assert main(["train", "--resume", str(folder.path), *option, "--quiet"]) == 0
    assert folder.summary.is_file()
    event = json.loads(folder.events.read_text().splitlines()[-1])
    assert (event["event"], event["device"], event["precision"]) == ("resumed", "cpu", "float32")


def test_a_published_run_is_evaluated_by_its_checkpoints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = evaluated(capsys, run)
    assert len(before["epochs"]) == 2
    assert evaluated(capsys, published(run)) == before
    # One that no state counted among the best: of a writer that was killed.
    folder = RunFolder(run)
    tensors, _ = load_checkpoint(folder.epoch_checkpoint(before["epochs"][0]))
    save_checkpoint(folder.epoch_checkpoint(9), tensors, {"epoch": 9, "val": -1e9})
    assert evaluated(capsys, run) == before


def test_damage_to_a_published_run_is_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = evaluated(capsys, run)["epochs"]
    folder = RunFolder(published(run))
    folder.epoch_checkpoint(first).write_bytes(folder.epoch_checkpoint(first).read_bytes()[:-100])
    assert main(["evaluate", str(run), "--tasks", "4", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["epochs"] == [second]
    assert f"epoch-{first:04d}.safetensors is damaged" in " ".join(captured.err.split())
    shutil.copy(folder.epoch_checkpoint(second), folder.epoch_checkpoint(first))
    assert main(["evaluate", str(run), "--tasks", "4", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["epochs"] == [second]
    assert f"says that it is of epoch {second}" in " ".join(captured.err.split())
    tensors, _ = load_checkpoint(folder.epoch_checkpoint(second))
    for epoch in (first, second):
        save_checkpoint(folder.epoch_checkpoint(epoch), tensors, {"epoch": epoch})
    assert "none of the checkpoints" in said(capsys, "evaluate", str(run))


def test_a_published_run_is_not_begun_anew(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = (run / "metrics.jsonl").read_bytes()
    published(run)
    assert "has no state to go on from" in said(capsys, "train", "--resume", str(run))
    (run / "summary.json").unlink()
    assert "has no state to go on from" in said(capsys, "train", "--resume", str(run))
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_a_run_killed_before_its_first_state_begins_anew(finished: Path, tmp_path: Path) -> None:
    config = replace(small(), outer=replace(small().outer, epochs=1))
    folder = start(tmp_path / "run", config)
    first = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)[0]
    folder.metrics.write_text(first)
    assert main(["train", "--resume", str(folder.path), "--quiet"]) == 0
    assert [json.loads(line)["epoch"] for line in folder.metrics.read_text().splitlines()] == [1]
