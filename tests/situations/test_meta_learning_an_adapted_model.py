"""A module that ``adapt`` returned, trained or meta-learned again, does as a fresh model with its state does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from by_copies import check_refusal
from by_hand import STEPS, Examples, vectors
from torch import Tensor, nn

from innerloop import MetaLearner, maml


class CallsItselfByAFunction(nn.Module):
    """A copy's function calls the layers of the original."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.features = lambda x: torch.tanh(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class CallsItselfByAHook(CallsItselfByAFunction):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Identity()
        self.features.register_forward_hook(lambda module, inputs, output: torch.tanh(self.body(output)))


@pytest.mark.parametrize("build", [CallsItselfByAFunction, CallsItselfByAHook])
def test_functions_that_call_the_models_own_layers(build: type[nn.Module]) -> None:
    support: Examples = vectors()
    learner = MetaLearner(build(), F.cross_entropy, maml(inner_steps=STEPS))
    *_, theta = learner.trajectory(support)
    try:
        answer = learner.adapt(support)(support[0])
    except TypeError as error:
        check_refusal(error, r"features")
        return
    torch.testing.assert_close(answer.detach(), learner.predict(theta, STEPS, support[0]))


@pytest.mark.parametrize(("inputs", "label"), [(0, 0), (6, -100)])
def test_a_support_set_without_a_loss_is_an_error(inputs: int, label: int) -> None:
    """No examples, or none with a label: the loss is NaN, and so would be all weights."""
    support = torch.randn(inputs, 4), torch.full((inputs,), label)
    learner = MetaLearner(nn.Linear(4, 3), F.cross_entropy, maml(inner_steps=STEPS))
    with pytest.raises((ArithmeticError, ValueError), match="support"):
        learner.adapt(support)
