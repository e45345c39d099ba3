"""A run that was trained on a GPU, in tf32, is used on a machine without one: how it was computed is not what it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import innerloop
from innerloop.bench import measuring
from innerloop.bench.cases import CASES, Case
from innerloop.bench.contenders import CONTENDERS, Contender, Step
from innerloop.cli.main import main
from innerloop.training.run_folder import RunFolder

FROZEN = Path(__file__).parents[1] / "frozen" / "run-0.1"
ELSEWHERE = {"device": "cuda:1", "precision": "tf32", "threads": 64, "processes": 32, "cuda_graph": True}
ALONE = ["--threads", "1", "--processes", "1"]


@pytest.fixture(autouse=True)
def _float32(_float64_and_seed: None) -> None:
    torch.set_default_dtype(torch.float32)


def trained_elsewhere(folder: Path, **compute: Any) -> Path:
    shutil.copytree(FROZEN, folder)
    config = json.loads((folder / "config.json").read_text())
    config["config"]["compute"] |= {**ELSEWHERE, **compute}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return trained_elsewhere(tmp_path / "run")


def evaluated(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main(["evaluate", str(folder), "--tasks", "4", "--json", *ALONE, *options]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_it_is_evaluated_exactly(precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = evaluated(shutil.copytree(FROZEN, tmp_path / "here"), capsys)
    there = evaluated(trained_elsewhere(tmp_path / "there", precision=precision), capsys)
    assert there["test"] == here["test"]
    assert there["precision"] == "float32"
    rounded = evaluated(tmp_path / "there", capsys, "--precision", "bf16")
    assert rounded["precision"] == "bf16"
    assert rounded["test"] != here["test"]


def test_a_precision_that_this_machine_has_not(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--precision", "tf32", "--device", "cpu"]) == 2
    assert "give --precision float32" in capsys.readouterr().err.replace("\n", " ")


def test_it_is_adapted_and_used(run: Path, tmp_path: Path) -> None:
    support = {name: [np.random.default_rng(i).random((28, 28))] for i, name in enumerate("ab")}
    here, there = (innerloop.load(path).adapt(support) for path in (FROZEN, run))
    asked = [np.random.default_rng(9).random((28, 28))]
    assert there.probabilities(asked).equal(here.probabilities(asked))


@pytest.mark.skipif(torch.cuda.is_available(), reason="goes on with a GPU there")
def test_going_on_with_it_takes_a_precision_and_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = ["--device", "cpu", *ALONE, "--quiet"]
    assert main(["train", "--resume", str(run), *here]) == 2
    assert "give --precision float32" in capsys.readouterr().err.replace("\n", " ")
    assert main(["train", "--resume", str(run), *here, "--precision", "float32"]) == 0


def test_a_run_published_without_its_state(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_state = evaluated(run, capsys)
    (run / "checkpoints" / "latest.safetensors").unlink()
    without = evaluated(run, capsys)
    assert without["epochs"] == with_state["epochs"]
    assert without["test"] == with_state["test"]
    damaged = RunFolder(run).epoch_checkpoint(without["epochs"][0])
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert evaluated(run, capsys)["epochs"] == without["epochs"][1:]


def test_a_bench_goes_on_without_who_cannot_do_a_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = Case(method="maml", tasks=1, ways=2, queries=2, filters=4, inner_steps=1)
    monkeypatch.setitem(CASES, "tiny", tiny)
    monkeypatch.setitem(CASES, "transformer-maml", Case(**{**vars(CASES["transformer-maml"]), "tasks": 1}))
    names = ["--contenders", "innerloop", "convolutions alone", "--rounds", "1", "--warm-up", "0"]
    assert main(["bench", "transformer-maml", "tiny", *names, "--json"]) == 0
    cases = json.loads(capsys.readouterr().out)["cases"]
    assert list(cases["transformer-maml"]["contenders"]) == ["innerloop"]
    assert cases["transformer-maml"]["unable"] == {
        "convolutions alone": "convolutions alone cannot do transformer-maml"
    }
    assert list(cases["tiny"]["contenders"]) == ["innerloop", "convolutions alone"]


@contextmanager
def in_this_process(case: Case, name: str, device: torch.device) -> Iterator[Callable[[str], Any]]:
    """A contender without a process."""
    step = CONTENDERS[name].build(case, device)

    def ask(what: str) -> Any:
        try:
            return (0.1, step.take()) if what == "step" else measuring._rest(step, device, None)
        except StopIteration:
            raise measuring.ContenderError(f"{name} failed: it has no second step") from None

    yield ask


def test_a_bench_goes_on_without_who_fails_on_the_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that takes a step and then fails."""

    def building(case: Case, device: torch.device) -> Step:
        steps = iter([1.0])
        return Step(lambda: next(steps))

    monkeypatch.setattr(measuring, "_running", in_this_process)
    monkeypatch.setitem(CONTENDERS, "plain loop", Contender(building))
    monkeypatch.setitem(CONTENDERS, "innerloop", Contender(lambda case, device: Step(lambda: 2.0)))
    arguments = ["bench", "omniglot-maml", "--contenders", "innerloop", "plain loop", "--rounds", "2", "--warm-up", "0"]
    assert main([*arguments, "--json"]) == 1
    case = json.loads(capsys.readouterr().out)["cases"]["omniglot-maml"]
    assert case["unable"] == {"plain loop": "plain loop failed: it has no second step"}
    assert len(case["contenders"]["innerloop"]["seconds"]) == 2
