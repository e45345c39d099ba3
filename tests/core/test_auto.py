"""``compile="auto"``: compiled where that pays, by a count of operations that is the same on every machine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import gradients, relative_difference
from torch import nn
from zoo import CASES

from innerloop import MetaLearner, maml
from innerloop.engines import Auto, Compiled, Estimate
from innerloop.nn import MLP

POINTS = torch.randn(5, 10, 1, dtype=torch.float64)
TASKS = ((POINTS, POINTS.sin()), (POINTS, POINTS.sin()))


def learner(compile: str = "auto") -> MetaLearner:
    torch.manual_seed(0)
    made = MetaLearner(MLP(), F.mse_loss, maml(inner_steps=2), compile=compile)  # type: ignore[arg-type]
    for engine in made._engines.values():
        if isinstance(engine, Compiled):
            engine._backend = "eager"
    return made


def chosen(of: MetaLearner) -> object:
    assert isinstance(of.engine, Auto)
    return of.engine.chosen


def test_a_long_schedule_is_compiled_and_a_short_one_is_not() -> None:
    long, short = learner(), learner()
    assert long.expect(1_000_000, TASKS) == short.expect(10, TASKS)
    assert isinstance(chosen(long), Compiled)
    assert not isinstance(chosen(short), Compiled)


def test_a_loop_whose_end_is_unknown_is_compiled_once_that_would_have_paid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("innerloop.engines.auto.FEW", 2)
    monkeypatch.setattr("innerloop.engines.auto.estimate", lambda *given: Estimate(seconds=0.45, saved=0.1))
    auto, plain = learner(), learner("off")
    kinds = []
    for _ in range(6):
        for one in (auto, plain):
            one.backward(TASKS)
        kinds.append(isinstance(chosen(auto), Compiled))
    assert kinds == [False, False, False, False, True, True]
    assert relative_difference(gradients(auto), gradients(plain)) < 1e-12


def test_convolutions_are_not_compiled_on_a_cpu() -> None:
    case = CASES["conv_batch_norm"]
    made = MetaLearner(case.model(), case.loss, maml(inner_steps=2), compile="auto")
    estimate = made.expect(10**9, case.tasks())
    assert estimate is not None
    assert estimate.saved == 0
    assert not isinstance(chosen(made), Compiled)


def test_to_estimate_changes_nothing() -> None:
    case = CASES["dropout"]
    made = MetaLearner(case.model(), case.loss, maml(inner_steps=2), compile="auto")
    tasks = case.tasks()
    made.backward(tasks)
    before, random = {n: t.clone() for n, t in made.state_dict().items()}, torch.get_rng_state()
    made.expect(10, tasks)
    torch.testing.assert_close(made.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)


def test_only_auto_has_a_choice() -> None:
    assert MetaLearner(nn.Linear(3, 2), F.mse_loss).expect(1000, TASKS) is None
