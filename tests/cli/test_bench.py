"""``innerloop bench``: what it refuses, and that all contenders take the same step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from innerloop.bench import floors, measuring
from innerloop.bench.cases import CASES, CPU, Case
from innerloop.bench.contenders import CONTENDERS, FLOORS, Step
from innerloop.cli.main import main
from innerloop.nn import MLP

TINY = Case(method="maml", tasks=2, ways=2, queries=2, filters=4, inner_steps=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "there is no case 'nowhere'; there are omniglot-mamlpp"),
        (["omniglot-maml", "--contenders", "nobody"], "there is no contender 'nobody'; there are innerloop;"),
        (["transformer-maml", "--contenders", "convolutions alone"], "convolutions alone cannot do transformer-maml"),
        (["omniglot-maml", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["sinusoid-maml", "--contenders", "matrix products alone"], "matrix products alone cannot do sinusoid-maml"),
        (["omniglot-maml", "--contenders", "innerloop, captured"], "innerloop, captured is not for --device cpu"),
        (["omniglot-maml", "--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_no_gpu_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda"]) == 2
    assert "--device cuda: PyTorch finds no GPU here" in capsys.readouterr().err


SMALL = {
    "conv4": TINY,
    "resnet12": Case("resnet12", tasks=2, ways=2, queries=1, channels=3, size=16, filters=4, inner_steps=2),
    "transformer": Case("transformer", tasks=2, ways=2, queries=2, size=6, filters=8, inner_steps=2),
    "mlp": replace(CASES["sinusoid-maml-5-steps"], tasks=3, inner_steps=2),
}


# Not those in bf16, whose rounding batch norm over two images magnifies; the compiled one has a test of its own.
ALIKE = [n for n in CONTENDERS if n not in {*FLOORS, "plain loop", "innerloop, compiled"} and "bf16" not in n]


@pytest.mark.parametrize("network", SMALL)
@pytest.mark.parametrize("name", ALIKE)
def test_every_contender_has_the_same_loss(
    name: str, network: str, kept_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    contender, case = CONTENDERS[name], SMALL[network]
    if not contender.installed:
        pytest.skip(f"{contender.needs} is not installed")
    if not contender.takes(case):
        pytest.skip(f"{name} cannot do {network}")
    monkeypatch.setattr("innerloop.bench.contenders.available_cores", lambda: 1)
    monkeypatch.setattr("innerloop.bench.contenders.keep_freed_memory", lambda: None)
    expected = CONTENDERS["plain loop"].build(case, CPU).take()
    step = contender.build(case, CPU)
    assert [step.take(), step.take()] == pytest.approx([expected] * 2, rel=1e-4)
    assert step.compile_seconds() is None


@pytest.fixture
def kept_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_compiled_contender_compiles_before_it_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(CASES, "tiny", replace(SMALL["mlp"], inner_steps=1))
    names = ["innerloop, compiled", "plain loop"]
    assert main(["bench", "tiny", "--rounds", "2", "--warm-up", "1", "--json", "--contenders", *names]) == 0
    found = json.loads(capsys.readouterr().out)["cases"]["tiny"]["contenders"]
    compiled, plain = (found[name] for name in names)
    assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    assert sum(compiled["seconds"]) < compiled["compile_seconds"]
    assert plain["compile_seconds"] is None


def test_operations_of_a_step_are_counted() -> None:
    counted = measuring.operations(Step(lambda: float(torch.ones(3).neg().neg().sum())), CPU)
    fewer = measuring.operations(Step(lambda: float(torch.ones(3).sum())), CPU)
    assert counted == fewer + 2


def test_what_a_floor_records() -> None:
    resnet = SMALL["resnet12"]
    convolutions = floors.recorded(resnet.build_model(), resnet.meta_batch().support.inputs[0], "convolutions")
    assert len(convolutions) == 16  # three and a shortcut in each of four blocks
    assert sum(o.of_data for o in convolutions) == 2  # the shortcut of the first block sees the images too
    mlp = floors.recorded(MLP(), torch.randn(5, 1), "matrix products")
    assert [(o.a.shape[-1], o.b.shape[-1], o.of_data) for o in mlp] == [(1, 40, True), (40, 40, False), (40, 1, False)]
    text = SMALL["transformer"]
    products = floors.recorded(text.build_model(), text.meta_batch().support.inputs[0], "matrix products")
    # Two layers of four linear maps and the attention's two products each, and the head.
    assert len(products) == 2 * 6 + 1
    assert not any(o.of_data for o in products)


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
    def running(case: Case, name: str, device: torch.device) -> Iterator[Callable[[str], tuple[float, float]]]:
        def ask(what: str) -> tuple[float, float]:
            if what == "rest":
                raise measuring.ContenderError(f"{name} died")
            return 0.5, 1.0

        yield ask

    monkeypatch.setattr(measuring, "_running", running)
    assert main(["bench", "omniglot-maml", "--contenders", "plain loop", "--rounds", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["cases"]["omniglot-maml"]["contenders"]["plain loop"]
    assert (found["seconds"], found["memory"]) == ([0.5, 0.5], None)
