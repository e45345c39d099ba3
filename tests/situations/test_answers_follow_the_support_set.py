"""Buffers that the support set's passes have moved are what the query set meets, in use as in training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from by_copies import equal_or_refused
from by_hand import STEPS, adapted, vectors
from torch import Tensor, nn

from innerloop import MetaLearner, maml


class Centres(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.register_buffer("mu", torch.zeros(5))
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.tanh(self.body(x))
        self.move(features.detach())
        return self.head(features - self.mu)

    def move(self, features: Tensor) -> None:
        self.mu = 0.9 * self.mu + 0.1 * features.mean(0)


class InPlace(Centres):
    def move(self, features: Tensor) -> None:
        self.mu.mul_(0.9).add_(0.1 * features.mean(0))


class Counts(Centres):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def move(self, features: Tensor) -> None:
        self.calls += 1
        self.mu = 0.1 * self.calls * torch.ones(5)


class PowerIteration(Centres):
    """The largest singular value, one iteration a call, as ``spectral_norm`` has it; in every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("u", torch.ones(5) / 5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            v = F.normalize(self.body.weight.t() @ self.u, dim=0)
            self.u = F.normalize(self.body.weight @ v, dim=0)
        weight = self.body.weight / (self.u @ self.body.weight @ v)
        return self.head(torch.tanh(F.linear(x, weight, self.body.bias)))


STATEFUL = [Centres, InPlace, Counts, PowerIteration]


@pytest.mark.parametrize("build", STATEFUL)
def test_adapting_and_predicting_give_what_a_plain_loop_gives(build: Callable[[], nn.Module]) -> None:
    support, (query, _) = vectors(), vectors(5)
    expected = adapted(build(), support)(query)
    learner = MetaLearner(build(), F.cross_entropy, maml(inner_steps=STEPS))

    def predicted() -> Tensor:
        *_, theta = learner.trajectory(support)
        return learner.predict(theta, STEPS, query)

    for answer in (lambda: learner.adapt(support)(query), predicted):
        equal_or_refused(answer, expected, r"buffer (mu|calls|u)\b")


@pytest.mark.parametrize("build", STATEFUL)
def test_the_query_loss_in_training_is_that_in_use(build: Callable[[], nn.Module]) -> None:
    support, (query, labels) = vectors(), vectors(5)
    tasks = tuple((x[None], y[None]) for x, y in (support, (query, labels)))
    loss = MetaLearner(build(), F.cross_entropy, maml(inner_steps=STEPS)).backward(tasks).loss
    module = MetaLearner(build(), F.cross_entropy, maml(inner_steps=STEPS)).adapt(support)
    torch.testing.assert_close(F.cross_entropy(module(query), labels).detach(), loss, rtol=1e-9, atol=0)
