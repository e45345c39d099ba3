"""Runs: what a run folder holds, and that an interrupted run ends as one that was never stopped."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import StoppingProgress, records, small, start

from innerloop.training.checkpoints import load_checkpoint
from innerloop.training.config import ConfigError
from innerloop.training.progress import Progress
from innerloop.training.run_folder import RunFolder
from innerloop.training.trainer import DivergedError, InterruptedRunError, outer_rate, train


def test_a_run_folder_holds_what_it_promises(tmp_path: Path) -> None:
    config = small()
    folder = start(tmp_path / "run", config)
    summary = train(folder, "sinusoid", config, Progress(shown=False), "the command").summary
    assert folder.read_config() == ("sinusoid", config)
    lines = records(folder)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line["derivative_order"] for line in lines] == [1, 2, 2]
    assert lines[0]["loss_weights"] == [0.5, 0.5]
    assert lines[2]["loss_weights"] == [0.0, 1.0]
    assert all(len(line["val_losses_per_step"]) == 4 for line in lines)  # steps 0..3
    assert json.loads(folder.summary.read_text()) == json.loads(json.dumps(summary))
    assert summary["command"] == "the command"
    assert len(summary["best_epochs"]) == summary["test"]["members"] == 2
    kept = {p.name for p in (folder.path / "checkpoints").iterdir()}
    assert kept == {
        "latest.safetensors",
        "previous.safetensors",
        *(f"epoch-{e:04d}.safetensors" for e in summary["best_epochs"]),
    }
    losses = {line["epoch"]: line["val_loss"] for line in lines}
    assert summary["best_epochs"] == sorted(losses, key=lambda e: losses[e])[:2]


# 1-7 are iterations of the first epoch, 8 its validation, 9-15 iterations, and so on; 25 and 26 are the test.
@pytest.mark.parametrize("at", [1, 7, 8, 12, 16, 23, 24, 25, 26])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_and_resumed_run_ends_as_one_never_stopped(
    tmp_path: Path, at: int, number: signal.Signals, whole: tuple[RunFolder, dict[str, object]]
) -> None:
    config = small()
    folder = start(tmp_path / "stopped", config)
    with pytest.raises(InterruptedRunError):
        train(folder, "sinusoid", config, StoppingProgress(at, number))
    summary = train(folder, "sinusoid", config, Progress(shown=False)).summary
    whole_folder, whole_summary = whole
    assert summary["test"] == whole_summary["test"]
    assert records(folder) == records(whole_folder)
    mine, _ = load_checkpoint(folder.latest)
    theirs, _ = load_checkpoint(whole_folder.latest)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, dict[str, object]]:
    folder = start(tmp_path_factory.mktemp("whole") / "run", small())
    return folder, train(folder, "sinusoid", small(), Progress(shown=False)).summary


def test_training_learns_sinusoids(tmp_path: Path) -> None:
    config = small("maml", inner_lr=0.02)
    config = replace(config, outer=replace(config.outer, epochs=2, iterations=100, meta_batch=8, outer_lr=1e-2))
    config = replace(config, evaluation=replace(config.evaluation, test_tasks=100))
    summary = train(start(tmp_path / "run", config), "sinusoid", config, Progress(shown=False)).summary
    before, *_, after = (step["loss"] for step in summary["test"]["per_step"])
    assert after < 0.5 * before


def test_divergence_names_iteration_and_step_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    config = small("maml")
    folder = start(tmp_path / "run", config)
    with pytest.raises(InterruptedRunError):
        train(folder, "sinusoid", config, StoppingProgress(5))
    good = folder.latest.read_bytes()
    # From here on the inner rate is so large that the first inner step leaves the floats.
    broken = replace(config, method=replace(config.method, inner_lr=1e30))
    with pytest.raises(DivergedError, match=r"iteration 6: the (support|query) loss of task \d is \S+ at inner step"):
        train(folder, "sinusoid", broken, Progress(shown=False))
    assert folder.latest.read_bytes() == good


def test_cosine_annealing_is_applied_and_off_without_ca() -> None:
    config = small()
    assert outer_rate(config, 0) == config.outer.outer_lr
    # 3 epochs of 7 iterations: the middle is at iteration 10.5, so 10 and 11 lie symmetrically around it.
    middle = (config.outer.outer_lr + config.outer.outer_lr_min) / 2
    assert (outer_rate(config, 10) + outer_rate(config, 11)) / 2 == pytest.approx(middle, rel=1e-12)
    assert outer_rate(config, 21) == config.outer.outer_lr_min
    plain = replace(config, method=replace(config.method, ca=False))
    assert {outer_rate(plain, i) for i in range(22)} == {plain.outer.outer_lr}


def test_an_existing_folder_and_a_folder_that_is_no_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        RunFolder(tmp_path).create("sinusoid", small())
    with pytest.raises(ConfigError, match="not a run: it has no config"):
        RunFolder(tmp_path).read_config()
    for text in ("{", "[]", '{"version": 1}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match="not a run's config"):
            RunFolder(tmp_path).read_config()
    (tmp_path / "config.json").write_text('{"version": 9, "preset": "x", "config": {}}')
    with pytest.raises(ConfigError, match=r"version 9, of a newer innerloop.*Upgrade"):
        RunFolder(tmp_path).read_config()
    (tmp_path / "config.json").write_text('{"version": "1", "preset": "x", "config": {}}')
    with pytest.raises(ConfigError, match="version '1', which is none"):
        RunFolder(tmp_path).read_config()
