"""Inner rules take the steps that torch's optimisers take, and are differentiable where those would not be."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import WAYS, gradients, make, relative_difference
from torch import nn

from innerloop import Examples, MetaLearner, Task, maml, stack_tasks
from innerloop.update_rules import UPDATE_RULES

OPTIMISERS: dict[str, tuple[Any, float]] = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1), 1e-13),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1e-13),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.1), 1e-6),  # epsilon is inside the root here, beside it there
}


@pytest.mark.parametrize("rule", OPTIMISERS)
def test_trajectory_is_that_of_the_optimiser(rule: str) -> None:
    make, tolerance = OPTIMISERS[rule]
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    support = Examples(torch.randn(6, 3), torch.randn(6, 2))
    learner = MetaLearner(model, F.mse_loss, maml(inner_steps=2, inner_rule=rule))
    twin = copy.deepcopy(model)
    optimiser = make(twin.parameters())
    walked = list(learner.trajectory(support, steps=6))
    assert len(walked) == 7
    for theta in walked:
        for name, p in twin.named_parameters():
            torch.testing.assert_close(theta[name], p.detach(), rtol=tolerance, atol=tolerance)
        optimiser.zero_grad()
        F.mse_loss(twin(support.inputs), support.targets).backward()
        optimiser.step()


def test_every_rule_is_compared() -> None:
    assert OPTIMISERS.keys() == UPDATE_RULES.keys()


@pytest.mark.parametrize("way", WAYS)
def test_adam_behind_dead_relus(way: str) -> None:
    """Gradients that are exactly zero: sqrt(v) has an infinite slope there."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].bias[:2] = -100.0
    task = Task(Examples(torch.randn(5, 3), torch.randn(5, 1)), Examples(torch.randn(5, 3), torch.randn(5, 1)))
    learner = make(model, F.mse_loss, maml(inner_steps=3, inner_lr=0.01, inner_rule="adam"), way)
    learner.backward(stack_tasks([task]))
    found = gradients(learner)
    assert all(g.isfinite().all() for g in found.values())
    assert not found["adapted/0.weight"][:2].any()
    # The dead units play no part: the living ones' gradients are those of a network without them.
    small = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        for part, whole in (
            (small[0].weight, model[0].weight[2:]), (small[0].bias, model[0].bias[2:]),
            (small[2].weight, model[2].weight[:, 2:]), (small[2].bias, model[2].bias),
        ):  # fmt: skip
            part.copy_(whole)
    alone = make(small, F.mse_loss, learner.method, way)
    alone.backward(stack_tasks([task]))
    living = {
        "adapted/0.weight": found["adapted/0.weight"][2:],
        "adapted/0.bias": found["adapted/0.bias"][2:],
        "adapted/2.weight": found["adapted/2.weight"][:, 2:],
        "adapted/2.bias": found["adapted/2.bias"],
    }
    assert relative_difference(living, gradients(alone)) < 1e-9
