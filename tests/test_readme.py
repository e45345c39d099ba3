"""The README's loop, run as it stands there, and its figures, quoted from the records."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def test_the_readmes_figures_are_those_of_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import record

    assert record.quote(README.read_text()) == README.read_text()


def test_the_pages_benchmarks_are_those_of_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    for page, markers, quotation in (
        (tables.PAGE, tables.FIGURES, tables.quoted()),
        (tables.README, tables.SPEED, tables.summary()),
    ):
        assert tables.quote(page.read_text(), markers, quotation) == page.read_text()


def test_the_readmes_loop_learns(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(code, str(README), "exec"), names)
    assert 0.0 <= float(re.findall(r"tensor\((.+)\)", capsys.readouterr().out)[0]) <= 1.0

    def accuracy(task: Any) -> float:
        classifier = names["learner"].adapt(task.support)
        assert type(classifier) is type(names["model"])
        right: torch.Tensor = classifier(task.query.inputs).argmax(1) == task.query.targets
        return float(right.float().mean())

    tasks = [names["tasks"].task("test", i) for i in range(40)]
    assert sum(map(accuracy, tasks)) / len(tasks) > 0.5  # chance is 0.2
