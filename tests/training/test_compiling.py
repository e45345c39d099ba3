"""``--compile``: what a run records of it, what it says, and what happens where nothing can be compiled."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch._inductor

from innerloop.cli.main import main
from innerloop.engines import Estimate, tracing

TINY = ["--epochs", "2", "--iterations", "3", "--val-tasks", "3", "--test-tasks", "4", "--meta-batch", "2", "--quiet"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Graphs run as they are traced, without a compiler; a number for each."""
    graphs: list[int] = []

    def as_it_is(graph: Any, arguments: Any, threads: int) -> Any:
        graphs.append(threads)
        return graph

    monkeypatch.setattr(tracing, "_by_inductor", as_it_is)
    return graphs


def train(name: str, *options: str) -> dict[str, Any]:
    assert main(["train", "sinusoid", *TINY, "--out", name, *options]) == 0
    return json.loads(Path(name, "summary.json").read_text())["test"]["best"]["batch"]  # type: ignore[no-any-return]


def recorded(name: str) -> str:
    return json.loads(Path(name, "config.json").read_text())["config"]["compute"]["compile"]  # type: ignore[no-any-return]


def test_a_run_is_the_same_compiled_or_not_and_so_is_its_evaluation(
    traced: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    without = train("without", "--compile", "off")
    assert not traced
    with_graphs = train("with", "--compile", "on")
    assert traced
    assert with_graphs["loss"] == pytest.approx(without["loss"], rel=1e-4)
    assert (recorded("without"), recorded("with")) == ("off", "on")
    capsys.readouterr()
    losses = []
    for choice in ("off", "on"):
        assert main(["evaluate", "with", "--tasks", "4", "--json", "--compile", choice]) == 0
        losses.append(json.loads(capsys.readouterr().out)["test"]["best"]["support"]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_auto_decides_once_says_so_and_records_it(
    traced: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train("short")
    assert recorded("short") == "off"
    assert not traced
    monkeypatch.setattr("innerloop.training.trainer.LEAST_UPDATES", 1)
    monkeypatch.setattr("innerloop.engines.auto.estimate", lambda *given: Estimate(seconds=12.0, saved=30.0))
    assert main(["train", "sinusoid", *[o for o in TINY if o != "--quiet"], "--out", "long"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "compiling the inner step takes about 12 s and saves about 3 min (--compile off: without)" in said
    assert recorded("long") == "on"
    assert traced


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "the disk of Inductor's cache is full"),
        (RuntimeError("InvalidCxxCompiler: No working C++ compiler found"), "there is no C++ compiler"),
        (RuntimeError("CppCompileError: C++ compile error"), "CppCompileError"),
    ],
)
def test_where_nothing_can_be_compiled_the_run_goes_on_without(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(torch._inductor, "standalone_compile", fails)
    with pytest.warns(UserWarning, match="MLP is not compiled") as caught:
        train("run", "--compile", "on")
    words = [str(w.message) for w in caught if "not compiled" in str(w.message)]
    assert len(words) == 1
    assert said in words[0]
    assert "It is computed without" in words[0]


def test_a_compiler_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor, "standalone_compile", lambda *args, **kwargs: time.sleep(5))
    with pytest.warns(UserWarning, match=r"compiling took longer than 1 s\. It is computed without"):
        train("run", "--compile", "on", "--compile-timeout", "1")


def test_no_time_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "sinusoid", *TINY, "--compile-timeout", "0"]) == 2
    assert "compile_timeout" in capsys.readouterr().err.replace("-", "_")
