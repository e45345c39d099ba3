"""``innerloop bench``: what it refuses, and that all contenders take the same step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from innerloop.bench import measuring
from innerloop.bench.cases import CASES, Case
from innerloop.cli.main import main

TINY = Case(method="maml", tasks=2, ways=2, queries=2, filters=4, inner_steps=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "there is no case 'nowhere'; there are omniglot-mamlpp"),
        (["omniglot-maml", "--contenders", "nobody"], "there is no contender 'nobody'; there are innerloop;"),
        (["transformer-maml", "--contenders", "convolutions alone"], "convolutions alone cannot do transformer-maml"),
        (["omniglot-maml", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["omniglot-maml", "--warm-up", "-1"], "--warm-up must be at least 0, got -1"),
    ],
)
def test_bad_input_is_quoted(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")


def test_a_peer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("innerloop.bench.contenders.find_spec", lambda name: None)
    assert main(["bench", "omniglot-maml", "--contenders", "higher"]) == 2
    assert "pip install 'innerloop[bench]'" in capsys.readouterr().err.replace("\n", " ")


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in CASES)


@pytest.mark.parametrize("method", ["maml", "maml_plus_plus"])
def test_every_contender_takes_the_same_step(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(CASES, "tiny", Case(**{**vars(TINY), "method": method}))
    peers = [p for p in ("higher", "torchopt") if method == "maml" and find_spec(p)]
    names = ["innerloop", "innerloop, mixed mode", "plain loop", "convolutions alone", *peers]
    out = tmp_path / "bench.json"
    arguments = ["tiny", "--rounds", "2", "--warm-up", "0", "--json", "--out", str(out), "--contenders", *names]
    assert main(["bench", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == result
    found = result["cases"]["tiny"]["contenders"]
    assert list(found) == names
    for name, m in found.items():
        assert len(m["seconds"]) == 2
        assert m["memory_total"] > 0
        if name != "convolutions alone":
            assert m["loss"] == pytest.approx(found["plain loop"]["loss"], rel=1e-4)
    assert found["innerloop"]["times_innerloop"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert result["environment"]["torch"]


def test_times_are_kept_of_one_that_dies_after_its_last_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def running(case: Case, name: str) -> Iterator[Callable[[str], tuple[float, float]]]:
        def ask(what: str) -> tuple[float, float]:
            if what == "memory":
                raise measuring.ContenderError(f"{name} died")
            return 0.5, 1.0

        yield ask

    monkeypatch.setattr(measuring, "_running", running)
    assert main(["bench", "omniglot-maml", "--contenders", "plain loop", "--rounds", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["cases"]["omniglot-maml"]["contenders"]["plain loop"]
    assert (found["seconds"], found["memory"]) == ([0.5, 0.5], None)
