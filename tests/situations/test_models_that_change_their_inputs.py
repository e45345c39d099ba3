"""In-place changes of what a model or a loss is given are not seen by the caller."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_hand import STEPS, WAYS_TO_A_GRADIENT, adapted, assert_same_gradients, meta_batch, meta_gradient, vectors
from torch import Tensor, nn

from innerloop import MetaLearner, maml


class Subtracts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5)
        return self.head(torch.tanh(self.body(x)))


class Masks(Subtracts):
    def forward(self, x: Tensor) -> Tensor:
        x[:, 0] = 0
        return self.head(torch.tanh(self.body(x)))


def relu_first() -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))


@pytest.mark.parametrize(("mode", "parallel"), [*WAYS_TO_A_GRADIENT, ("first-order", "vmap")])
@pytest.mark.parametrize("build", [Subtracts, Masks, relu_first])
def test_the_callers_tensors_stay(build: Any, mode: str, parallel: str) -> None:
    model, tasks = build(), meta_batch(vectors)
    _, expected = meta_gradient(model, tasks)
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS), mode, parallel=parallel)
    before = [t.clone() for pair in tasks for t in pair]
    learner.backward(tasks)
    assert all(t.equal(b) for t, b in zip([t for pair in tasks for t in pair], before, strict=True))
    if mode != "first-order":
        assert_same_gradients(model, expected)


@pytest.mark.parametrize("build", [Subtracts, Masks, relu_first])
def test_so_in_adapting_and_predicting(build: Any) -> None:
    model = build()
    learner, support, (query, _) = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS)), vectors(), vectors(5)
    copies = support[0].clone(), query.clone()
    *_, theta = learner.trajectory(support)
    outputs = learner.predict(theta, STEPS, query)
    learner.adapt(support)
    assert support[0].equal(copies[0])
    assert query.equal(copies[1])
    torch.testing.assert_close(outputs, adapted(model, support)(query.clone()).detach())


def test_containers_too() -> None:
    class Pops(Subtracts):
        def forward(self, batch: dict[str, Tensor], extra: list[Tensor]) -> Tensor:
            extra.append(batch.pop("x"))
            return self.head(torch.tanh(self.body(extra[-1])))

    (x, y), (query_x, query_y) = meta_batch(vectors)
    support = {"batch": {"x": x}, "extra": []}, y
    MetaLearner(Pops(), F.cross_entropy, maml(inner_steps=2)).backward(
        (support, ({"batch": {"x": query_x}, "extra": []}, query_y))
    )
    assert support[0]["batch"].keys() == {"x"}
    assert support[0]["extra"] == []


def test_a_loss_that_changes_its_targets() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets.mul_(0.5))

    tasks = meta_batch(lambda: (torch.randn(6, 4), torch.randn(6, 3)))
    model = nn.Linear(4, 3)
    _, expected = meta_gradient(model, tasks, loss)
    before = tasks[0][1].clone()
    MetaLearner(model, loss, maml(inner_steps=STEPS), parallel="loop").backward(tasks)
    assert tasks[0][1].equal(before)
    assert_same_gradients(model, expected)


def test_expanded_tensors() -> None:
    """Tasks that share memory, which no change in place may be made to."""
    (x, y), _ = meta_batch(vectors, tasks=1)
    tasks = ((x.expand(3, -1, -1), y.expand(3, -1)),) * 2
    model = Subtracts()
    _, expected = meta_gradient(model, tasks)
    MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS), parallel="loop").backward(tasks)
    assert_same_gradients(model, expected)
