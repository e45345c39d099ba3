"""Weights that a loss depends on by another way than the model's parameters: they count, or somebody says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_copies import check_refusal, exact_or_refused
from by_hand import STEPS, assert_same_gradients, meta_batch, meta_gradient, vectors
from torch import Tensor, nn

from innerloop import MetaLearner, maml

WAYS = [("reverse", "loop"), ("mixed", "loop"), ("auto", "auto")]
SAID = "gradient|parameter"


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.setup()

    def setup(self) -> None:
        """What a class keeps."""

    def weight(self) -> Tensor:
        return self.body.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(x, self.weight(), self.body.bias)))


class InAList(Plain):
    def setup(self) -> None:
        self.weights = [self.body.weight]

    def weight(self) -> Tensor:
        return self.weights[0]


class InADict(Plain):
    def setup(self) -> None:
        self.weights = {"body": self.body.weight}

    def weight(self) -> Tensor:
        return self.weights["body"]


class AsAView(Plain):
    def setup(self) -> None:
        self.rows = self.body.weight[:2]

    def weight(self) -> Tensor:
        return torch.cat([self.rows, self.body.weight[2:]])


class ByAFunction(Plain):
    def setup(self) -> None:
        weight = self.body.weight
        self.linear = lambda: weight

    def weight(self) -> Tensor:
        return self.linear()


@pytest.mark.parametrize(("mode", "parallel"), WAYS)
@pytest.mark.parametrize("build", [InAList, InADict, AsAView, ByAFunction])
def test_a_parameter_kept_twice(build: Callable[[], nn.Module], mode: Any, parallel: Any) -> None:
    model, tasks = build(), meta_batch(vectors)
    _, expected = meta_gradient(Plain(), tasks)
    exact_or_refused(
        lambda: MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS), mode, parallel).backward(tasks),
        model, expected, SAID,
    )  # fmt: skip


@pytest.mark.parametrize(("mode", "parallel"), WAYS)
def test_a_penalty_on_a_list_of_parameters_made_beforehand(mode: Any, parallel: Any) -> None:
    class WithPenalty(Plain):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), sum(p.square().sum() for p in self.parameters())

    model, tasks = Plain(), meta_batch(vectors)
    parameters = list(model.parameters())

    def penalised(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + 0.1 * sum(p.square().sum() for p in parameters)

    _, expected = meta_gradient(WithPenalty(), tasks, lambda out, y: F.cross_entropy(out[0], y) + 0.1 * out[1])
    learner = MetaLearner(model, penalised, maml(inner_steps=STEPS), mode, parallel)
    exact_or_refused(lambda: learner.backward(tasks), model, expected, SAID)


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs / self.temperature, targets)


def test_a_loss_with_parameters_of_its_own() -> None:
    loss = Temperature()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            MetaLearner(Plain(), loss, maml(inner_steps=STEPS)).backward(meta_batch(vectors))
        except (ValueError, TypeError) as error:
            check_refusal(error, r"temperature")
            return
    assert loss.temperature.grad is not None or any("temperature" in str(w.message) for w in caught)


def test_a_loss_whose_parameters_are_frozen_is_fine() -> None:
    model, loss, tasks = Plain(), Temperature().requires_grad_(False), meta_batch(vectors)
    _, expected = meta_gradient(model, tasks, loss)
    MetaLearner(model, loss, maml(inner_steps=STEPS)).backward(tasks)
    assert_same_gradients(model, expected)


@pytest.mark.parametrize(("mode", "parallel"), WAYS)
def test_inputs_that_come_out_of_an_encoder(mode: Any, parallel: Any) -> None:
    """Whoever leaves the graph on them expects the encoder to learn."""
    encoder, ((x, y), (query, labels)) = nn.Linear(4, 4), meta_batch(vectors)
    tasks = (encoder(x), y), (encoder(query), labels)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            MetaLearner(Plain(), F.cross_entropy, maml(inner_steps=STEPS), mode, parallel).backward(tasks)
        except ValueError as error:
            check_refusal(error, r"detach")
            return
    assert encoder.weight.grad is not None or any("detach" in str(w.message) for w in caught)


def test_layers_in_a_python_list() -> None:
    """``self.layers = [nn.Linear(...)]``: neither adapted nor learned, which is said."""

    class Stack(Plain):
        def setup(self) -> None:
            self.layers = [nn.Linear(5, 5)]

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layers[0](torch.tanh(self.body(x))))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            MetaLearner(Stack(), F.cross_entropy, maml(inner_steps=STEPS)).backward(meta_batch(vectors))
        except (ValueError, TypeError) as error:
            check_refusal(error, r"layers")
            return
    assert any("layers" in str(w.message) for w in caught)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_a_parameters_gradient(register: str) -> None:
    """A mask over a gradient, say: it is applied to the meta-gradient, or refused by name."""
    model, called = Plain(), []
    getattr(model.head.weight, register)(called.append)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS)).backward(meta_batch(vectors))
        except (ValueError, TypeError) as error:
            check_refusal(error, r"head\.weight")
            return
    assert called or any("head.weight" in str(w.message) for w in caught)
