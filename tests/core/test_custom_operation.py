"""An operation of the user's own that autograd knows how to differentiate twice in reverse, and no other way."""

import warnings
from typing import Any

import pytest
import torch
from oracle import gradients, naive, relative_difference, scramble
from torch import Tensor, nn
from zoo import CASES

from innerloop import MetaLearner, maml_plus_plus
from innerloop.learner import Parallel


class Cube(torch.autograd.Function):
    """Twice differentiable in reverse, unknown to forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * 3 * x**2


class Cubic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Dropout(0.3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Cube.apply(self.body(x)))


# "auto" tries vmap first, and with dropout that attempt draws masks.
@pytest.mark.parametrize(("dropout", "parallel"), [(True, "loop"), (False, "loop"), (False, "auto")])
def test_gradients_are_exact(dropout: bool, parallel: Parallel) -> None:
    case = CASES["dropout"]
    torch.manual_seed(1)
    model = Cubic()
    if not dropout:
        model.body[2].p = 0.0
    method = maml_plus_plus(inner_steps=3, da_epochs=0)
    learner = scramble(MetaLearner(model, case.loss, method, "mixed", parallel, stored_steps=2))
    tasks = case.tasks()
    torch.manual_seed(4)
    _, expected, _ = naive(learner, tasks, [0.2, 0.2, 0.6])
    torch.manual_seed(4)
    with warnings.catch_warnings():
        if parallel != "auto":
            warnings.simplefilter("error")
        learner.backward(tasks, epoch=4)
    assert relative_difference(gradients(learner), expected) < 1e-9
