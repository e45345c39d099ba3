"""innerloop adapt, predict and export, as a person calls them."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from innerloop.cli.main import main
from innerloop.methods import maml
from innerloop.training.config import Config, NetworkConfig

Draw = Callable[..., Image.Image]


@pytest.fixture(autouse=True)
def run(tmp_path: Path, make_run: Callable[..., Path], support_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run, and a person's folder ``my classes`` beside it; they are where the commands are called."""
    monkeypatch.chdir(tmp_path)
    method = maml(inner_steps=3, inner_lr=0.4, zero_init=("head.*",))
    return make_run(tmp_path / "run", Config(network=NetworkConfig(filters=8), method=method))


@pytest.fixture
def model(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["adapt", "run", "my classes", "--out", "my.safetensors"]) == 0
    capsys.readouterr()
    return "my.safetensors"


@pytest.fixture
def images(shapes: Draw) -> list[str]:
    """Paths with the names that people give files."""
    names = ['it\'s "one".png', "zwei drei.PNG", "four.jpg", "five,six.bmp", "深/七.png", ".hidden.png"]
    Path("new/深").mkdir(parents=True)
    for i, name in enumerate(names):
        shapes("dot", i).save(Path("new", name))
    return [str(Path("new", name)) for name in sorted(names) if not name.startswith(".")]


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    assert main(list(arguments)) == code
    return " ".join(capsys.readouterr().err.split())


def test_adapt_says_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapt", "run", "my classes", "--out", "my.safetensors"]) == 0
    said = capsys.readouterr().out
    assert "the images are dark ink, and are turned over: this run knows bright ink" in said
    assert "3 classes, 9 images: bar (3), dot (3), post (3)" in said
    assert "after 3 inner steps: loss on these images 1.099 ->" in said
    assert "of 9), 95% interval" in said
    assert "leave-one-out: 9 adaptations" in said
    assert "innerloop predict my.safetensors IMAGES" in said


def test_one_shot_gives_no_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("bar", "dot"):
        Path("my classes", kind, "1.png").unlink()
        Path("my classes", kind, "2.png").unlink()
    assert main(["adapt", "run", "my classes", "--out", "my.safetensors"]) == 0
    assert "a single image gives no estimate" in capsys.readouterr().out


def test_adapt_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--steps", "2", "--normalisation", "running", "--json"]
    assert main(["adapt", "run", "my classes", "--out", "my.safetensors", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["classes"] == ["bar", "dot", "post"]
    assert len(found["support_losses"]) == len(found["support_accuracies"]) == 3
    assert found["normalisation"] == "running"
    assert found["estimate"]["images"] == 9
    assert main(["adapt", "run", "my classes", "--out", "other.safetensors", "--no-estimate", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["estimate"] is None


def test_adapt_says_what_is_wrong_before_it_works(capsys: pytest.CaptureFixture[str], shapes: Draw) -> None:
    Path("there.safetensors").write_text("x")
    adapt = ["adapt", "run", "my classes", "--out"]
    assert "exists already" in error_of(capsys, *adapt, "there.safetensors")
    assert main([*adapt, "there.safetensors", "--overwrite"]) == 0
    assert "is a folder" in error_of(capsys, *adapt, "run")
    assert "there is no folder" in error_of(capsys, *adapt, "no/where.safetensors")
    assert "there is no run at 'nowhere'" in error_of(capsys, "adapt", "nowhere", "my classes", "--out", "x")
    assert "'nothing' does not exist" in error_of(capsys, "adapt", "run", "nothing", "--out", "x")
    assert "--steps -1" in error_of(capsys, *adapt, "x", "--steps", "-1")
    Path("my classes", "bar", "bad.png").write_text("x")
    assert "bad.png: not an image that can be read" in error_of(capsys, *adapt, "x")
    assert not Path("x").exists()
    assert main([*adapt, "x", "--skip-broken"]) == 0
    Path("my classes", "DOT").mkdir()
    shapes("dot").save(Path("my classes", "DOT", "a.png"))
    assert "have one name but for" in error_of(capsys, *adapt, "y", "--skip-broken")


def test_predict_names_a_class_for_each_image(
    model: str, images: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", model, "new"]) == 0
    captured = capsys.readouterr()
    lines = [line.split("\t") for line in captured.out.splitlines()]
    assert [line[0] for line in lines] == images
    assert {line[1] for line in lines} <= {"bar", "dot", "post"}
    assert all(line[2].endswith("%") for line in lines)
    assert captured.err == ""
    assert main(["predict", model, images[3], images[0]]) == 0  # in the order asked
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == [images[3], images[0]]


def test_predict_for_programs(model: str, images: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", model, "new", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [f["image"] for f in found] == images
    for f in found:
        assert list(f["probabilities"]) == ["bar", "dot", "post"]
        assert f["probability"] == f["probabilities"][f["class"]] == max(f["probabilities"].values())
    assert main(["predict", model, "new", "--csv"]) == 0
    header, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert header == ["image", "class", "probability"]
    assert [row[:2] for row in rows] == [[f["image"], f["class"]] for f in found]
    assert [float(row[2]) for row in rows] == pytest.approx([f["probability"] for f in found], abs=1e-6)


def test_predict_goes_on_past_broken_images(model: str, images: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("new/a.png").write_text("x")
    assert main(["predict", model, "none.png", "new"]) == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == len(images)
    assert "new/a.png: not an image that can be read" in captured.err.replace(os.sep, "/")
    assert "none.png: " in captured.err
    assert "2 of 7 images cannot be read" in captured.err


def test_predict_says_what_is_wrong(model: str, images: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "take one of them" in error_of(capsys, "predict", model, "new", "--json", "--csv")
    assert "no images given" in error_of(capsys, "predict", model)
    Path("empty").mkdir()
    assert "'empty' has no image files in it" in error_of(capsys, "predict", model, "empty")
    assert "no classifier at 'none'" in error_of(capsys, "predict", "none", "new")
    assert "a run to adapt first" in error_of(capsys, "predict", "run", "new")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not have such names")
def test_names_that_are_no_text(model: str, shapes: Draw, capsys: pytest.CaptureFixture[str]) -> None:
    shapes("dot").save("plain.png")
    for name in (b"\xff.png", b"new\nline.png"):
        os.link(b"plain.png", os.path.join(os.fsencode(os.getcwd()), name))
    for option in ([], ["--csv"], ["--json"]):
        assert main(["predict", model, ".", *option]) == 0
    assert "\\xff.png" in capsys.readouterr().out


def test_predict_into_a_pipe_that_closes(model: str, images: list[str]) -> None:
    command = f"{sys.executable} -m innerloop predict {model} {'new ' * 200} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_export(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", model, "--torchscript", "--out", "my.pt"]) == 0
    said = capsys.readouterr().out
    assert "written: my.pt. images [n, 1, 28, 28] in [0, 1] -> probabilities [n, 3]" in said
    assert "turn images over first (1 - value)" in said
    assert "checked: differs by" in said
    assert main(["export", model, "--torchscript", "--out", "my.pt", "--overwrite", "--logits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["output"] == "logits"
    assert "name one of --onnx" in error_of(capsys, "export", model, "--out", "x")
    assert "name one of --onnx" in error_of(capsys, "export", model, "--out", "x", "--onnx", "--torchscript")
    assert "exists already" in error_of(capsys, "export", model, "--torchscript", "--out", "my.pt")


def test_onnx_without_its_packages_says_what_to_install(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'innerloop[export]'" in error_of(capsys, "export", model, "--onnx", "--out", "my.onnx")
    assert not Path("my.onnx").exists()
