"""``innerloop serve`` as a person meets it, on a run that really was trained."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import webbrowser
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from PIL import Image
from stand_in import serving_app, text

from innerloop.classify import load
from innerloop.cli.main import main
from innerloop.data import strokes
from innerloop.methods import Method
from innerloop.serve import create_app
from innerloop.training.building import build_learner
from innerloop.training.checkpoints import save_checkpoint
from innerloop.training.config import Config, NetworkConfig
from innerloop.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as training leaves it, of a network that has learned nothing yet, which is enough to adapt."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "small")
    config = Config(network=NetworkConfig(filters=4), method=Method(inner_steps=3))
    folder.create("quickstart", config)
    learner = build_learner(config, torch.device("cpu"))
    save_checkpoint(folder.epoch_checkpoint(1), learner.state_dict(), {"epoch": 1, "val": 0.2})
    return folder.path


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Dark ink on white: three characters, each by three drawers."""
    images = strokes({"train": 1, "val": 1, "test": 3}, drawers=3)["test"].images
    folder = tmp_path_factory.mktemp("drawings")
    files = [folder / f"{i}.png" for i in range(9)]
    for file, pixels in zip(files, images, strict=True):
        Image.fromarray((255 - pixels[0]).numpy()).resize((140, 140)).save(file)
    return [file.read_bytes() for file in files]


def test_the_api_answers_what_the_library_does(run: Path, drawings: list[bytes]) -> None:
    examples = {name: drawings[3 * c : 3 * c + 2] for c, name in enumerate("abc")}
    queries = drawings[2::3]
    expected = load(run).adaptation(examples, steps=4)
    with serving_app(create_app(load(run))) as client:
        body = {"classes": {name: [text(image) for image in images] for name, images in examples.items()}}
        adapted = client.post("/api/adapt?steps=4", json=body).json()
        body = {"images": [text(image) for image in queries]}
        predicted = client.post(f"/api/predict/{adapted['id']}", json=body).json()["predictions"]
        info = client.get("/api/info").json()["model"]
    assert adapted["support_losses"] == pytest.approx(expected.support_losses.tolist())
    assert adapted["support_accuracies"] == pytest.approx(expected.support_accuracies.tolist())
    # The ink was noticed to be dark, which this model's is not.
    assert adapted["notes"] == list(expected.notes) != []
    shares = torch.tensor([p["by_step"] for p in predicted]).transpose(0, 1)
    torch.testing.assert_close(shares, expected.probabilities(queries))
    assert (info["dataset"], info["ways"], info["image_size"]) == ("strokes", 5, 28)


def test_from_start_to_ctrl_c(run: Path) -> None:
    command = [sys.executable, "-m", "innerloop", "serve", str(run), "--port", "0", "--no-open"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            address = re.search(r"http://127\.0\.0\.1:\d+/", said)
            assert address, said
            assert httpx.get(f"{address[0]}api/health", timeout=60, trust_env=False).json()["status"] == "ok"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would be opened in a browser, with a display and a server that ends at once."""
    addresses: list[str] = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(webbrowser, "open", addresses.append)
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    return addresses


def test_the_page_is_opened(
    run: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(run), "--port", "0"]) == 0
    assert len(opened) == 1
    assert opened[0] in capsys.readouterr().out
    assert main(["serve", str(run), "--port", "0", "--no-open"]) == 0
    if sys.platform == "linux":
        monkeypatch.delenv("DISPLAY")
        monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
        assert main(["serve", str(run), "--port", "0"]) == 0
    assert len(opened) == 1


def test_a_warning_where_others_can_reach_it(run: Path, opened: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(run), "--port", "0"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert main(["serve", str(run), "--port", "0", "--host", "0.0.0.0"]) == 0
    assert "without a password" in " ".join(capsys.readouterr().err.split())
    assert opened[1].startswith("http://127.0.0.1:")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["serve", *arguments, "--no-open"]) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said.err


def test_a_port_that_is_taken(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} is taken by another program" in refused(capsys, str(run), "--port", str(port))


def test_other_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "70000" in refused(capsys, "--port", "70000")
    assert "no.such.host.invalid" in refused(capsys, "--host", "no.such.host.invalid")
    assert "192.0.2.1" in refused(capsys, "--host", "192.0.2.1", "--port", "0")  # an address kept for documents
    assert "nowhere" in refused(capsys, str(tmp_path / "nowhere"), "--port", "0")


@pytest.mark.parametrize("missing", ["uvicorn", "fastapi", "python_multipart"])
def test_the_extra_is_not_installed(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [n for n in sys.modules if n.startswith(("innerloop.serve", missing))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    said = refused(capsys)
    assert "pip install 'innerloop[serve]'" in said
    assert missing in said
