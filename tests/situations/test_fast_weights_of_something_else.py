"""What ``predict`` is given in the place of fast weights, and other arguments that would mean something else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_hand import STEPS, meta_batch, vectors
from torch import Tensor, nn

from innerloop import MetaLearner, maml


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        y = self.head(torch.tanh(self.body(x)))
        return y if offset is None else y + offset[:, None]


@pytest.fixture
def learner() -> MetaLearner:
    return MetaLearner(Plain(), F.cross_entropy, maml(inner_steps=STEPS))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda theta: {f"adapted/{n}": t for n, t in theta.items()},
        lambda theta: {n: t for n, t in theta.items() if n.startswith("head")},
        lambda theta: {},
        lambda theta: {**theta, "head.bias": torch.zeros(1)},
        lambda theta: {**theta, "other.weight": torch.zeros(1)},
    ],
)
def test_weights_of_other_names_or_shapes(learner: MetaLearner, spoil: Any) -> None:
    *_, theta = learner.trajectory(vectors())
    with pytest.raises(ValueError, match=r"head\.bias|body\.weight|other\.weight"):
        learner.predict(spoil(theta), STEPS, vectors()[0])


@pytest.mark.parametrize("weights", [lambda model: model, lambda model: list(model.parameters()), lambda model: None])
def test_what_are_no_weights(learner: MetaLearner, weights: Any) -> None:
    with pytest.raises(TypeError, match="trajectory"):
        learner.predict(weights(learner.model), STEPS, vectors()[0])


X, ONE_HOT = torch.randn(6, 4), F.one_hot(torch.arange(6) % 3, 3)


@pytest.mark.parametrize("epoch", [True, "0", torch.tensor([1.0, 2.0])])
def test_epochs_that_are_none(epoch: Any) -> None:
    learner = MetaLearner(Plain(), F.cross_entropy, maml(msl=True))
    with pytest.raises((TypeError, ValueError), match="epoch must be a number"):
        learner.backward(meta_batch(vectors), epoch)


@pytest.mark.parametrize("epoch", [np.int64(1), np.float32(1)])
def test_epochs_of_numpy(epoch: Any) -> None:
    losses = [
        MetaLearner(nn.Linear(4, 3), F.cross_entropy, maml(msl=True)).plan(e).weights for e in (epoch, float(epoch))
    ]
    assert losses[0] == losses[1]


def test_a_class_in_the_place_of_a_loss() -> None:
    with pytest.raises(TypeError, match=r"CrossEntropyLoss\(\)"):
        MetaLearner(Plain(), nn.CrossEntropyLoss).backward(meta_batch(vectors))


def test_a_number_in_the_place_of_a_scaler(learner: MetaLearner) -> None:
    with pytest.raises(TypeError, match=r"scaler.*GradScaler"):
        learner.backward(meta_batch(vectors), scaler=1024.0)
