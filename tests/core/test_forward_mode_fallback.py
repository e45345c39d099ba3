"""Mixed mode with an operation that has no forward-mode derivative."""

import warnings
from typing import Any

import pytest
import torch
from oracle import gradients, make, naive, relative_difference, scramble
from torch import Tensor, nn
from zoo import CASES

from innerloop import MetaLearner, maml_plus_plus


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
def test_gradients_are_still_exact_and_it_is_said_once(dropout: bool, parallel: str) -> None:
    case = CASES["dropout"]
    torch.manual_seed(1)
    model = Cubic()
    if not dropout:
        model.body[2].p = 0.0
    learner = scramble(make(model, case.loss, maml_plus_plus(inner_steps=3, da_epochs=0), "mixed"))
    if parallel == "auto":
        learner = scramble(MetaLearner(model, case.loss, learner.method, "mixed"))
    tasks = case.tasks()
    torch.manual_seed(4)
    _, expected, _ = naive(learner, tasks, [0.2, 0.2, 0.6])
    torch.manual_seed(4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learner.backward(tasks, epoch=4)
        assert relative_difference(gradients(learner), expected) < 1e-9
        learner.backward(tasks, epoch=4)
    said = [str(w.message) for w in caught if "forward-mode" in str(w.message)]
    assert len(said) == 1
    assert "Cubic" in said[0]
