"""The command line as a person meets it: what it prints, its exit codes, and what it says of bad input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, tzinfo
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from innerloop.cli.main import main
from innerloop.training.config import PRESETS

TINY = ["--epochs", "2", "--iterations", "3", "--val-tasks", "3", "--test-tasks", "4", "--meta-batch", "2"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Nine classes of four noisy images each."""
    random = np.random.default_rng(0)
    for c in range(9):
        folder = tmp_path / "images" / f"class {c}"
        folder.mkdir(parents=True)
        for i in range(4):
            pixels = np.clip(random.normal(25 * c, 20, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "images"


def folder_run(images: Path, *more: str) -> list[str]:
    small = ["--ways", "2", "--queries", "1", "--image-size", "16", "--filters", "4"]
    return ["train", "folder", "--data", str(images), *small, *TINY, *more]


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What standard error says when these arguments are refused; no run folder may have been made."""
    before = set(Path().glob("runs/*"))
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    assert set(Path().glob("runs/*")) == before
    return " ".join((captured.err + captured.out).replace("│", " ").split())


def test_train_then_evaluate_as_json(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(folder_run(images, "--json", "--out", "run")) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["test"]["best"]["batch"]["tasks"] == 4
    assert {p.name for p in Path("run").iterdir()} == {
        "checkpoints",
        "config.json",
        "figures",
        "metrics.jsonl",
        "summary.json",
    }
    assert {p.name for p in Path("run/figures").iterdir()} == {
        "accuracy.png",
        "gradient_norm.png",
        "inner_steps.png",
        "msl_weights.png",
        "overview.png",
        "process.json",
        "process.png",
        "rates.png",
        "task.png",
    }
    assert main(["evaluate", "run", "--tasks", "4", "--json"]) == 0
    evaluation = json.loads(capsys.readouterr().out)
    assert evaluation["test"] == summary["test"]
    assert main(["evaluate", "run", "--tasks", "5", "--steps", "8"]) == 0
    printed = capsys.readouterr().out
    assert "transductive" in printed
    assert "inductive" in printed
    assert "8: " in printed


def test_sinusoid_draws_the_adapted_curves(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "sinusoid", *TINY, "--out", "run"]) == 0
    assert "mean squared error" in capsys.readouterr().out
    assert Path("run/figures/adapted_curves.png").stat().st_size > 10_000


@pytest.mark.usefixtures("_no_figures")
def test_every_method_trains_from_the_command_line() -> None:
    for method in ("maml", "fomaml", "meta_sgd", "anil", "boil", "maml_plus_plus"):
        assert main(["train", "sinusoid", "--method", method, *TINY, "--json", "--out", method]) == 0
        switches = json.loads(Path(method, "config.json").read_text())["config"]["method"]
        assert switches["msl"] == (method == "maml_plus_plus")
        assert switches["meta_sgd"] == (method == "meta_sgd")
        assert switches["second_order"] == (method != "fomaml")


@pytest.mark.usefixtures("_no_figures")
@pytest.mark.parametrize("switch", ["msl", "da", "bnrs", "bnwb", "lslr", "ca"])
def test_every_repair_is_a_switch_on_plain_maml(images: Path, switch: str) -> None:
    assert main(folder_run(images, "--method", "maml", f"--{switch}", "--json", "--out", "run")) == 0
    switches = json.loads(Path("run/config.json").read_text())["config"]["method"]
    assert {s for s in ("msl", "da", "bnrs", "bnwb", "lslr", "ca") if switches[s]} == {switch}
    assert main(folder_run(images, f"--no-{switch}", "--json", "--out", "rest")) == 0
    switches = json.loads(Path("rest/config.json").read_text())["config"]["method"]
    assert {s for s in ("msl", "da", "bnrs", "bnwb", "lslr", "ca") if not switches[s]} == {switch}


def test_help_lists_options_with_the_presets_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "omniglot-20way-1shot", "--method", "maml", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--ways INT N, classes in a task. (default: 20)" in text
    for option in ("--inner-lr", "--msl", "--no-da", "--bnrs", "--bnwb", "--lslr", "--ca", "--outer-lr", "--resume"):
        assert option in text
    assert main(["--help"]) == 0
    assert main(["--version"]) == 0


@pytest.mark.usefixtures("_no_figures")
def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    words = capsys.readouterr().out.split()
    assert set(PRESETS) <= set(words)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "unknown command 'trian'"),
        (["train", "omniglot-5way-1shor"], "unknown preset 'omniglot-5way-1shor'; did you mean omniglot-5way-1shot"),
        (["train", "--method", "maml+"], "unknown method 'maml+'; there are maml, fomaml"),
        (["train", "--method"], "expected one argument"),
        (["train", "--wasy", "5"], "--wasy"),
        (["train", "--ways", "five"], "five"),
        (["train", "--ways", "0"], "--ways 0"),
        (["train", "--lslr", "--meta-sgd"], "both learn the inner rates"),
        (
            ["train", "--ways", "101", "--train-classes", "101", "--no-centre"],
            "101-way tasks need 101 classes, and split 'val' has 100",
        ),
        (
            ["train", "--shots", "15", "--queries", "6", "--train-classes", "9", "--no-centre"],
            "15 shots + 6 queries = 21 images of each class, and class",
        ),
        (["train", "--device", "cuda:77"], "--device cuda:77 cannot be used"),
        (["train", "--device", "cpu", "--precision", "tf32"], "--precision tf32 is a GPU's, and this run is on cpu"),
        (["train", "omniglot-5way-1shot", "--data", "nowhere"], "nowhere"),
        (["train", "omniglot-5way-1shot"], "--download"),
        (["train", "mini-imagenet-5way-1shot"], "needs the folder of its images: --data DIR"),
        (["train", "mini-imagenet-5way-1shot", "--data", "nowhere"], "nowhere"),
        (["train", "folder", "--data", "nowhere"], "nowhere"),
        (
            ["train", "quickstart", "--adapt", "haed.*", "--train-classes", "9", "--no-centre"],
            "no trainable parameter of Conv4 matches 'haed.*'",
        ),
        (["train", "--resume", "nowhere"], "nowhere is not a run"),
        (["evaluate"], "Folder of the run. (required)"),
        (["evaluate", "nowhere"], "nowhere is not a run"),
        (["evaluate", "nowhere", "--tasks", "0"], "--tasks 0"),
        (["presets", "all"], "takes no arguments, got all"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in error_of(capsys, *arguments)


@pytest.mark.usefixtures("_no_figures")
def test_an_existing_run_is_not_overwritten(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(folder_run(images, "--json", "--out", "run")) == 0
    capsys.readouterr()
    assert "run exists already. Go on with that run: innerloop train --resume run" in error_of(
        capsys, *folder_run(images, "--out", "run")
    )


@pytest.mark.usefixtures("_no_figures")
def test_resuming_with_another_config_is_refused(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(folder_run(images, "--json", "--out", "run")) == 0
    capsys.readouterr()
    assert "--ways was 2, not 3; --outer-lr was 0.001, not 0.01" in error_of(
        capsys, "train", "--resume", "run", "--ways", "3", "--outer-lr", "0.01"
    )
    assert "a run of preset folder, not of quickstart" in error_of(capsys, "train", "quickstart", "--resume", "run")
    assert "has a method already" in error_of(capsys, "train", "--resume", "run", "--method", "maml")
    assert main(["train", "--resume", "run", "--threads", "1", "--json"]) == 0  # where it runs may change


@pytest.mark.usefixtures("_no_figures")
def test_broken_images_are_named_and_can_be_skipped(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "class 3" / "0.png").write_bytes(b"")
    (images / "class 4" / "bad.png").write_text("not an image")
    said = error_of(capsys, *folder_run(images))
    assert "2" in said
    assert "bad.png" in said
    assert "--skip-broken" in said
    (images / "class 3" / "extra.png").write_bytes((images / "class 3" / "1.png").read_bytes())
    assert main(folder_run(images, "--skip-broken", "--json")) == 0
    assert "bad.png" in capsys.readouterr().err


@pytest.mark.usefixtures("_no_figures")
def test_a_folder_as_people_have_them(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "class 3" / "Thumbs.db").write_bytes(b"x")
    (images / "class 4" / "notes.txt").write_text("x")
    (images / "small").mkdir()
    (images / "small" / "0.png").write_bytes((images / "class 0" / "0.png").read_bytes())
    (images / "nothing").mkdir()
    assert main(folder_run(images)) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "9 classes, 36 images, 4 a class, 24 x 20 pixels" in said
    assert "classes: 5 train, 2 val, 2 test, shared out by chance" in said
    assert "left out 2 of 11 classes, with fewer than 2 images each" in said
    assert "small: 1 image" in said
    assert "left out: 1 file ('notes.txt') in class 4" in said
    assert "no class in" in error_of(capsys, *folder_run(images, "--shots", "6"))


def test_divergence_stops_with_its_own_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "sinusoid", *TINY, "--inner-lr", "1e30", "--out", "run", "--quiet"]) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "stopped at iteration 1: the query loss of task" in said
    assert "at inner step 1" in said
    assert "--inner-lr" in said


@pytest.fixture
def long_run() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "innerloop", "train", "sinusoid", "--out", "run", "--threads", "1"]
    options = ["--epochs", "400", "--iterations", "20", "--val-tasks", "2", "--test-tasks", "2"]
    process = subprocess.Popen(command + options, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (Path("run/metrics.jsonl").exists() and Path("run/checkpoints/latest.safetensors").exists()):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield process
    process.kill()


def test_ctrl_c_saves_and_says_how_to_go_on(long_run: subprocess.Popen[str]) -> None:
    long_run.send_signal(signal.SIGINT)
    _, said = long_run.communicate(timeout=60)
    assert long_run.returncode == 130
    assert "Saved. Go on with: innerloop train --resume run" in said
    assert "Traceback" not in said


def test_a_killed_run_can_be_evaluated_and_resumed(
    long_run: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    long_run.kill()
    long_run.communicate(timeout=60)
    assert main(["evaluate", "run", "--tasks", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["epochs"]
    done = len(Path("run/metrics.jsonl").read_text().splitlines())
    resumed = subprocess.Popen([sys.executable, "-m", "innerloop", "train", "--resume", "run", "--quiet"])
    deadline = time.monotonic() + 120
    while len(Path("run/metrics.jsonl").read_text().splitlines()) < done + 2:
        assert resumed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    resumed.terminate()
    assert resumed.wait(timeout=60) == 143
    epochs = [json.loads(line)["epoch"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert epochs == list(range(1, len(epochs) + 1))


@pytest.mark.usefixtures("_no_figures")
def test_a_folders_classes_are_shared_out_by_ratios(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # 9 classes: 3 for each split, so that 3 ways fit all of them, and no longer with 7 for training.
    assert main(folder_run(images, "--ways", "3", "--ratios", "0.34", "0.33", "0.33", "--json")) == 0
    capsys.readouterr()
    assert "3-way tasks need 3 classes" in error_of(capsys, *folder_run(images, "--ways", "3"))
    assert "0.9" in error_of(capsys, *folder_run(images, "--ratios", "0.9", "0.9", "0.9"))


@pytest.mark.usefixtures("_no_figures")
def test_mini_imagenet_takes_its_lists_from_elsewhere(images: Path, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "flat").mkdir()
    classes = sorted(images.iterdir())
    for i, split in enumerate(("train", "val", "test")):
        rows = ["filename,label"]
        for folder in classes[3 * i : 3 * i + 3]:
            for file in folder.iterdir():
                name = f"{folder.name}-{file.name}"
                (tmp_path / "flat" / name).write_bytes(file.read_bytes())
                rows.append(f"{name},{folder.name}")
        (tmp_path / "lists" / f"{split}.csv").write_text("\n".join(rows))
    small = ["--ways", "3", "--queries", "1", "--image-size", "16", "--filters", "4"]
    source = ["--data", "flat", "--splits-dir", "lists"]
    assert main(["train", "mini-imagenet-5way-1shot", *source, *small, *TINY, "--json"]) == 0


@pytest.mark.omniglot
@pytest.mark.usefixtures("_no_figures")
def test_maml_plus_plus_trains_on_the_real_omniglot(omniglot_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = ["--data", str(omniglot_root), "--filters", "32", "--da-epochs", "1"]
    assert main(["train", "omniglot-20way-1shot", *source, *TINY, "--test-tasks", "40", "--json", "--out", "run"]) == 0
    test = json.loads(capsys.readouterr().out)["test"]
    assert test["best"]["batch"]["accuracy"] > 0.1  # chance is 0.05
    assert test["best"]["batch"]["tasks"] == 40


def test_two_runs_that_begin_in_one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Stopped:
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr("innerloop.cli.train.datetime", Stopped)
    for _ in range(2):
        assert main(["train", "sinusoid", *TINY, "--quiet"]) == 0
    names = sorted(path.name for path in Path("runs").iterdir())
    assert names == ["sinusoid-maml-20260102-030405", "sinusoid-maml-20260102-030405-2"]
