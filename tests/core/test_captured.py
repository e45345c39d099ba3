"""Meta-gradients at fixed places: on a CPU the same computation without a graph, on a GPU the graph."""

from __future__ import annotations

import pytest
import torch
from oracle import gradients, make, relative_difference, scramble, statistics
from zoo import CASES

from innerloop import CapturedGradients, MetaLearner, fomaml, maml, maml_plus_plus
from innerloop.learner import NonFiniteLossError

CASE = CASES["conv_batch_norm"]
pytestmark = pytest.mark.usefixtures("device")


def learner_for(**switches: object) -> MetaLearner:
    method = maml_plus_plus(**{"inner_steps": 3, "msl_epochs": 4, "da_epochs": 2, **switches})
    return scramble(make(CASE.model(), CASE.loss, method, "mixed vmap"))


def test_equals_the_learner_through_training() -> None:
    """Over epochs in which DA changes the order, MSL its weights and then their pattern, with steps and statistics."""
    captured, plain = learner_for(), learner_for()
    graphs = CapturedGradients(captured)
    optimizers = [torch.optim.SGD(learner.parameters(), lr=0.1) for learner in (captured, plain)]
    for epoch in range(7):
        tasks = CASE.tasks(seed=epoch)
        results = graphs.backward(tasks, epoch), plain.backward(tasks, epoch)
        assert relative_difference(gradients(captured), gradients(plain)) < 1e-12
        for name in ("loss", "support_losses", "query_losses", "query_outputs"):
            a, b = (getattr(result, name) for result in results)
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(statistics(captured), statistics(plain))


def test_gradients_add_up_and_earlier_results_stay() -> None:
    captured, plain = learner_for(da=False), learner_for(da=False)
    graphs = CapturedGradients(captured)
    tasks = [CASE.tasks(size=s, seed=s) for s in (2, 3, 2)]
    first = graphs.backward(tasks[0], 0)
    kept = first.support_losses.clone()
    for t in tasks[1:]:
        graphs.backward(t, 0)
    torch.testing.assert_close(first.support_losses, kept)
    for t in tasks:
        plain.backward(t, 0)
    assert relative_difference(gradients(captured), gradients(plain)) < 1e-12


def test_what_cannot_be_captured_is_refused() -> None:
    for learner in (
        MetaLearner(CASE.model(), CASE.loss, maml(), parallel="loop"),
        MetaLearner(CASE.model(), CASE.loss, maml(), "reverse", parallel="vmap"),
    ):
        with pytest.raises(ValueError, match="parallel='vmap'"):
            CapturedGradients(learner)


def test_errors_are_those_of_the_learner() -> None:
    graphs = CapturedGradients(learner_for())
    with pytest.raises(ValueError, match="need the epoch"):
        graphs.backward(CASE.tasks())
    graphs = CapturedGradients(make(CASE.model(), CASE.loss, fomaml(inner_steps=2), "mixed vmap"))
    tasks = CASE.tasks()
    graphs.backward(tasks)
    tasks.query.inputs[1].fill_(torch.nan)
    with pytest.raises(NonFiniteLossError, match="query loss of task 1"):
        graphs.backward(tasks)
