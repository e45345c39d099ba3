"""The time left of a whole run: against a machine whose speed is known."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import small, start

import innerloop.training.time_left as time_left_module
from innerloop.training.progress import Progress
from innerloop.training.time_left import RunTimeLeft, TimeLeft, duration
from innerloop.training.trainer import train


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_by_hand() -> None:
    clock = Clock()
    left = TimeLeft({"a": 1.0, "b": 3.0}, more=7.0, clock=clock)
    left.units |= {"a": 10, "b": 4}
    assert left.total() is None
    clock.now += 50  # the first compiles
    left.done("a")
    assert left.total() is None
    for seconds in (1.0, 3.0):
        clock.now += seconds
        left.done("a")
    # a: 7 left at 2 s; b: 4 at 3 x 2 s.
    assert left.total() == 14 + 24 + 7
    clock.now += 99  # what is none of the parts'
    left.mark()
    clock.now += 2
    left.done("b", 2)
    assert left.of("b") == 2 * 1.0
    assert left.total() == 14 + 2 + 7
    left.done("a", -3)
    assert left.of("a") == 10 * 2.0


@pytest.mark.parametrize("faster", [1.0, 0.25])
def test_a_runs_time_is_known_after_a_few_updates(faster: float) -> None:
    """On a machine that takes what the weights say (``faster`` 1), and from the first validation on also on others."""
    config = small()
    config = replace(config, outer=replace(config.outer, epochs=6, iterations=10, meta_batch=2))
    clock = Clock()
    left = RunTimeLeft(config, clock=clock)
    seconds = {part: 10 * weight for part, weight in left.weights.items()}
    seconds["validation"] *= faster
    seconds["test"] *= faster
    evaluation = config.evaluation
    ahead = evaluation.test_tasks * evaluation.ensemble * seconds["test"] + left.more
    for epoch in range(6):
        ahead += 10 * seconds[left.training(epoch)] + evaluation.val_tasks * seconds["validation"]
    for epoch in range(6):
        left.plan(epoch, 0)
        for i in range(10):
            clock.now += seconds[left.training(epoch)]
            left.done(left.training(epoch))
            ahead -= seconds[left.training(epoch)]
            assert (left.words() is None) == (epoch == 0 and i < 5)
            if i and (faster == 1 or epoch):
                assert left.total() == pytest.approx(ahead)
        left.mark()
        for _ in range(evaluation.val_tasks):
            clock.now += seconds["validation"]
            left.done("validation")
            ahead -= seconds["validation"]
    assert left.of("validation") == 0
    assert left.total() == pytest.approx(ahead)


@pytest.mark.parametrize(("seconds", "words"), [(4.4, "4 s"), (89, "89 s"), (150, "2 min"), (7200, "2.0 h")])
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_run_says_once_how_long_it_will_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time_left_module, "SHORT", 0.0)
    train(start(tmp_path / "run", small()), "sinusoid", small(), Progress())
    said = " ".join(capsys.readouterr().err.split())
    time = r"\d+ s"
    (before,) = re.findall(f"about {time} left: training {time}, validation {time}, test {time}, then figures", said)
    assert said.index(before) < said.index("epoch 1/3")
    assert len(re.findall(f"tasks/s about {time} left", said)) == 3
