"""What the model answers on test tasks: the same by every engine, and by ``trajectory`` and ``predict``."""

from __future__ import annotations

import warnings

import pytest
import torch
from oracle import scramble
from torch.utils import _pytree as pytree
from zoo import CASES

from innerloop import MetaLearner, Method, maml, maml_plus_plus
from innerloop.adapted import TaskOutputs
from innerloop.engines import Compiled, Loop, Vmapped
from innerloop.norm_layers import Normalisation
from innerloop.tasks import Task, select_task, stacked

NORMALISATIONS: tuple[Normalisation, ...] = ("batch", "running", "support")
METHODS: dict[str, tuple[Method, int]] = {
    "momentum": (maml(inner_steps=2, inner_rule="momentum"), 2),
    "maml++, more steps than trained": (maml_plus_plus(inner_steps=2), 3),
}


def one_by_one(learner: MetaLearner, tasks: Task, steps: int) -> TaskOutputs:
    """As a user does it."""
    found = []
    for i in range(2):
        support, query = select_task(tasks, i)
        walk = list(learner.trajectory(support, steps))
        per_step = [learner.predict(theta, k, query.inputs) for k, theta in enumerate(walk)]
        inductive = {
            n: learner.predict(walk[-1], steps, query.inputs, n, support=support)
            for n in NORMALISATIONS
            if n != "batch"
        }
        found.append(TaskOutputs(stacked(per_step), inductive, query.targets))
    return stacked(found)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("network", CASES)
def test_every_engine_gives_the_same_outputs(network: str, name: str) -> None:
    case, (method, steps) = CASES[network], METHODS[name]
    learner = scramble(MetaLearner(case.model(), case.loss, method, parallel="loop"))
    tasks = case.tasks(seed=3)
    tasks = pytree.tree_map_only(torch.Tensor, lambda t: t[:2], tasks)
    expected = one_by_one(learner, tasks, steps)
    plain = Vmapped()
    engines = {
        "loop": Loop(),
        "vmapped": plain,
        "traced": Compiled(plain, learner.model, vmapped=name == "momentum", backend="eager"),
    }
    before = {n: t.clone() for n, t in learner.state_dict().items()}
    for kind, engine in engines.items():
        learner.engine = engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found = learner.task_outputs(tasks, steps, NORMALISATIONS)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=lambda m, kind=kind: f"{kind}: {m}")
    torch.testing.assert_close(learner.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("network", ["mlp_regressor"])
def test_fewer_tasks_than_a_graph_is_for(network: str) -> None:
    case = CASES[network]
    learner = MetaLearner(case.model(), case.loss, maml(inner_steps=2))
    tasks = case.tasks(seed=3)
    expected = learner.task_outputs(tasks)
    engine = learner.engine = Compiled(learner.engine, learner.model, vmapped=True, backend="eager")
    learner.task_outputs(tasks)
    graphs = len(engine._programs)
    one = pytree.tree_map_only(torch.Tensor, lambda t: t[:1], tasks)
    torch.testing.assert_close(learner.task_outputs(one).per_step, expected.per_step[:1], rtol=1e-12, atol=1e-12)
    assert len(engine._programs) == graphs


def test_what_is_asked_for_is_checked() -> None:
    case = CASES["mlp_regressor"]
    learner = MetaLearner(case.model(), case.loss, maml(inner_steps=2))
    with pytest.raises(ValueError, match="normalisation must be one of batch, running, support; got 'mean'"):
        learner.task_outputs(case.tasks(), normalisations=("mean",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps must be 0 or more, got -1"):
        learner.task_outputs(case.tasks(), steps=-1)
